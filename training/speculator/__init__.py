"""Trains a speculator for a language model: `python -m training.speculator --target MODEL --output DIR`."""
