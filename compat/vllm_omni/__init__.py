"""Omni-SP under the import name that programs use today."""

from omni_sp import OmniRequestOutput
from vllm_omni.entrypoints.omni import Omni
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

__all__ = ["Omni", "OmniDiffusionSamplingParams", "OmniRequestOutput"]
