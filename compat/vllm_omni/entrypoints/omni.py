"""Where programs look for Omni."""

from typing import Any

import omni_sp
from omni_sp.errors import ConfigError
from vllm_omni.diffusion.data import DEGREES, DiffusionParallelConfig
from vllm_omni.options import as_options

__all__ = ["Omni"]


class Omni(omni_sp.Omni):
    """Omni-SP's, which understands vLLM-Omni's keyword arguments too.

    Args:
        model: as for `omni_sp.Omni`.
        parallel_config: as for `omni_sp.Omni`, or None where degrees are among the options.
        **options: of `omni_sp.Omni`, or vLLM-Omni's. Of these ``ulysses_degree``, ``ring_degree``,
            ``cfg_parallel_size`` and the other fields of `DiffusionParallelConfig` may stand beside the model, and
            ``lora_path`` (one path or several) loads adapters that requests name by the names of their files.

    Raises:
        ConfigError: two options say the same, one means nothing here, or as `omni_sp.Omni` raises it.
    """

    def __init__(self, model: Any, parallel_config: Any = None, **options: Any) -> None:
        ours, degrees = as_options(options, DEGREES)
        if degrees and parallel_config is not None:
            raise ConfigError(f"{next(iter(degrees))} belongs in parallel_config, which is given too: write it there")
        super().__init__(model, DiffusionParallelConfig(**degrees) if degrees else parallel_config, **ours)
