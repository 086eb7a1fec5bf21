"""Tiny instances of every transformer class of diffusers, with inputs of awkward sizes."""
