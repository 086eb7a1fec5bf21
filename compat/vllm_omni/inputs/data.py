"""Where programs look for the sampling parameters."""

from omni_sp import OmniDiffusionSamplingParams

__all__ = ["OmniDiffusionSamplingParams"]
