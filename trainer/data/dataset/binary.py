"""The numpy types of a compiled data set's binary files: tokens with their bits, offsets, hashes and blocks."""

import numpy as np

TOKEN = np.dtype("<u4")
OFFSET = np.dtype("<u8")
HASH = np.dtype("<u8")
BLOCK = np.dtype([("document", "<u8"), ("sha256", "V32")])
COLUMN_BLOCK = np.dtype([("value", "<u8"), ("sha256", "V32")])
"""For a column in a block of documents: the number of the shard's values before it, and the SHA-256 of its bytes."""
# The top bit of a stored token says that it is trained. The bits below all of these hold the token's id.
TARGET_BIT = np.uint32(1 << 31)
# The bit below it says that a token is the first of the rejected answer of a pair.
REJECTED_BIT = np.uint32(1 << 30)
# The next two say so of the first token of a desired answer, and of the mismatched answer behind a labelled one.
DESIRED_BIT = np.uint32(1 << 29)
MISMATCHED_BIT = np.uint32(1 << 28)
# The bit below them says that a token is the first of a further answer to the prompt at the beginning of its document.
# The document holds that prompt only once.
SHARED_BIT = np.uint32(1 << 27)
ID_BITS = np.uint32(SHARED_BIT - 1)
# A token with one of these bits begins a new segment inside a document.
SEGMENT_BITS = REJECTED_BIT | MISMATCHED_BIT | SHARED_BIT
