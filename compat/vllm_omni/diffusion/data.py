"""Where programs look for the degrees."""

from typing import Any

import omni_sp
from omni_sp.errors import ConfigError
from omni_sp.validation import require_bool, require_int

__all__ = ["DiffusionParallelConfig"]


class DiffusionParallelConfig(omni_sp.DiffusionParallelConfig):
    """Omni-SP's, which understands vLLM-Omni's names of the same things too.

    Args:
        vae_patch_parallel_size: 1 for ``vae_parallel=False``; more for True, which takes all ranks.
        use_hsdp: ``shard_weights``: each rank of ulysses_degree × ring_degree keeps its part of the weights.
        **fields: of `omni_sp.DiffusionParallelConfig`.

    Raises:
        ConfigError: both names are given, or as `omni_sp.DiffusionParallelConfig` raises it.
    """

    def __init__(
        self, *, vae_patch_parallel_size: int | None = None, use_hsdp: bool | None = None, **fields: Any
    ) -> None:
        if vae_patch_parallel_size is not None:
            if "vae_parallel" in fields:
                raise ConfigError("vae_patch_parallel_size and vae_parallel say the same: give one of them")
            size = require_int("vae_patch_parallel_size", vae_patch_parallel_size, minimum=1, error=ConfigError)
            fields["vae_parallel"] = size > 1
        if use_hsdp is not None:
            if "shard_weights" in fields:
                raise ConfigError("use_hsdp and shard_weights say the same: give one of them")
            fields["shard_weights"] = require_bool("use_hsdp", use_hsdp, error=ConfigError)
        super().__init__(**fields)
