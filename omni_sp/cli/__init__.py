"""The ``omni-sp`` command, which the examples run as well."""

from omni_sp.cli.main import example, main

__all__ = ["example", "main"]
