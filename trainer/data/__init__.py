"""Training data, from a file to a packed row on a device.

The way of one document:

1. `sources` finds the files of a run's sources and reads their rows one by one.
2. `chat` turns a row into token ids and says which of them are trained.
3. `compile` writes those tokens once, as shards in the run's store, and commits them with a manifest; `dataset` opens
   them again and reads them in verified blocks of 256 documents.
4. `order` decides, for each epoch and from the seed alone, the order of the blocks, and `pack` puts the documents of
   a window of 64 blocks into bins of `data.sequence_length` tokens.
5. `stream` gives each rank its bins of a global step as micro-batches: one packed row each, in which no document
   sees another.

Nothing before `stream` needs torch.
"""
