"""Training data, from a file to a packed row on a device. Each room is a part of a document's way:

1. `source` finds the files of a run's sources and reads their rows in batches.
2. `format` recognises how rows are written, and makes conversations, texts or pairs of them.
3. `render` turns a row into token ids, and decides which of them are targets: the positions that are trained.
4. `compile` does so once for all runs that use the same data alike, on all cores, and writes shards under a name that
  is known before.
5. `dataset` is what was compiled: a manifest that proves it whole, and verified reading of it, a chapter at a time.
6. `order` decides, from the seed alone, which documents share a bin of `data.sequence_length` tokens and in which order
  bins are used, and
   gives each rank its bins of a step as micro-batches: one packed row each, in which no document sees another.

`look` reports on rows before anything is trained. Nothing before `order/stream.py` needs torch, and
`compile/length.py`, which tells `plan` how long an epoch is, needs no numpy.
"""
