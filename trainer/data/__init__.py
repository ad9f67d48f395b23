"""Training data, from a file to a packed row on a device.

The way of one document:

1. `sources` finds the files of a run's sources, and `reading` reads their rows in batches (`rows` those of text with `json_array`,
   `binary_rows` the others with `tables` for Arrow and Parquet, and `mds`), which `pool` hands to all cores. `detection` finds out
   the format of each source, and `formats` makes conversations, texts or pairs of its rows. `inputs` puts both together.
2. `messages` checks the conversation of a row, and `chat` turns it into token ids, some of which are targets: the positions
   that are trained. `encode` does so for a batch.
3. `compile` writes those tokens once, as shards (`shards`) in the run's store, under a name that is known before (`fingerprint`),
   and commits them with a `manifest`; `binary` is what lies in the shards' files. `dataset` opens them again and reads them in
   verified blocks of 256 documents, and `chapters` a chapter at a time.
4. `order` decides, for each epoch and from the seed alone, the order of the blocks, and `pack` puts the documents of
   a window of 64 blocks into bins of `data.sequence_length` tokens.
5. `stream` gives each rank its bins of a global step as micro-batches: one packed row each, in which no document
   sees another.

`prepare` goes this way for a run as far as its files, and `check` reports on the rows. Nothing before `stream` needs torch, and
`length`, which tells `plan` how long an epoch is, needs no numpy.
"""
