"""Stands in for vLLM: its command alone, of the standard library, so that it starts at once."""
