"""Storage: one seam over folders and buckets, and the formats of files that lie there."""
