"""Fills this rank's partitions: bytes are read in pieces, quantized on the way, and put in a parameter's place."""
