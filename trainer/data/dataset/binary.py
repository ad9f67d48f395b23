"""The binary files of a compiled data set as numpy sees them: tokens with their bits, offsets and hashes of documents,
and blocks.
"""

import numpy as np

TOKEN = np.dtype("<u4")
OFFSET = np.dtype("<u8")
HASH = np.dtype("<u8")
BLOCK = np.dtype([("document", "<u8"), ("sha256", "V32")])
COLUMN_BLOCK = np.dtype([("value", "<u8"), ("sha256", "V32")])
"""Of a column in a block of documents: the shard's values before it, and the SHA-256 of its bytes."""
# The top bit of a stored token says that it is trained; its id is what is below all of these bits.
TARGET_BIT = np.uint32(1 << 31)
# The bit below it says that a token is the first of the rejected answer of a pair.
REJECTED_BIT = np.uint32(1 << 30)
# The next two say so of the first token of a desired answer, and of the mismatched answer behind a labelled one.
DESIRED_BIT = np.uint32(1 << 29)
MISMATCHED_BIT = np.uint32(1 << 28)
# The bit below them says that a token is the first of another answer to the prompt that its document begins with, which
# is there once.
SHARED_BIT = np.uint32(1 << 27)
ID_BITS = np.uint32(SHARED_BIT - 1)
# A segment of its own begins with a token that has one of these, inside of a document.
SEGMENT_BITS = REJECTED_BIT | MISMATCHED_BIT | SHARED_BIT
