"""Where programs look for the front door."""

from omni_sp import Omni

__all__ = ["Omni"]
