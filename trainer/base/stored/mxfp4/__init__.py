"""Bases whose experts are in MXFP4, and the decoding of an expert."""
