"""Bases whose experts are in MXFP4, and how an expert is decoded."""
