"""How bytes become this rank's partitions: read in pieces, quantized on the way, put in a parameter's place."""
