"""Where programs look for the degrees."""

from omni_sp import DiffusionParallelConfig

__all__ = ["DiffusionParallelConfig"]
