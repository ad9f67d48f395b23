"""Exports of a run: the adapter, the merged model, and the proof of either."""
