"""Where programs look for the sampling parameters."""

from typing import Any

import omni_sp
from omni_sp.errors import SamplingParamsError
from vllm_omni.lora.request import LoRARequest, adapter_name

__all__ = ["OmniDiffusionSamplingParams"]


class OmniDiffusionSamplingParams(omni_sp.OmniDiffusionSamplingParams):
    """Omni-SP's, which understands vLLM-Omni's names of the same things too.

    Args:
        lora_request: the adapter of this request. ``Omni(lora={name: path})``, or ``Omni(lora_path=path)``, has loaded
            it under its ``lora_name``.
        lora_scale: what it counts; None for 1.
        **fields: of `omni_sp.OmniDiffusionSamplingParams`.

    Raises:
        SamplingParamsError: both names are given, or as `omni_sp.OmniDiffusionSamplingParams` raises it.
    """

    def __init__(
        self, *, lora_request: LoRARequest | None = None, lora_scale: float | None = None, **fields: Any
    ) -> None:
        if lora_request is not None:
            if fields.get("lora") is not None:
                raise SamplingParamsError("lora_request and lora say the same: give one of them", param="lora")
            fields["lora"] = (adapter_name(lora_request.lora_name), 1.0 if lora_scale is None else lora_scale)
        elif lora_scale is not None:
            raise SamplingParamsError(f"lora_scale={lora_scale} is the scale of lora_request: give both", param="lora")
        super().__init__(**fields)
