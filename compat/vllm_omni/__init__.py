"""Omni-SP under the import name that programs use today."""

from omni_sp import Omni, OmniDiffusionSamplingParams, OmniRequestOutput

__all__ = ["Omni", "OmniDiffusionSamplingParams", "OmniRequestOutput"]
