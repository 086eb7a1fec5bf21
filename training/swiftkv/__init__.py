"""Distils a SwiftKV model from a language model: `python -m training.swiftkv --teacher MODEL --output DIR`."""
