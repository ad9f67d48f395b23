"""Training data, from a file to a packed row on a device. A document passes through these packages in order:

1. `source` finds the files of a run's sources and reads their rows in batches.
2. `format` recognises how rows are written, and turns them into conversations, texts or pairs.
3. `render` turns a row into token ids, and decides which of them are targets: the positions that are trained.
4. `compile` runs these steps once for all runs that use the data in the same way, on all cores. It writes shards under
   a name that is known beforehand.
5. `dataset` is the compiled data: a manifest that proves it complete, and verified reading, one chapter at a time.
6. `order` decides from the seed alone which documents share a bin of `data.sequence_length` tokens, and in which order
   bins are used. It gives each rank its bins of a step as micro-batches: one packed row each, in which no document sees
   another.

`look` reports on rows before anything is trained. Only `order/stream.py` needs torch. `compile/length.py`, which tells
`plan` how long an epoch is, does not need numpy either.
"""
