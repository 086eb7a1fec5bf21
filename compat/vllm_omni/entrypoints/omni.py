"""Where programs look for Omni."""

from omni_sp import Omni

__all__ = ["Omni"]
