"""Where programs look for the degrees."""

from typing import Any

import omni_sp
from omni_sp.errors import ConfigError
from omni_sp.validation import require_int

__all__ = ["DiffusionParallelConfig"]


class DiffusionParallelConfig(omni_sp.DiffusionParallelConfig):
    """Omni-SP's, which understands vLLM-Omni's names of the same things too.

    Args:
        vae_patch_parallel_size: 1 for ``vae_parallel=False``; more for True, which takes all ranks.
        **fields: of `omni_sp.DiffusionParallelConfig`.

    Raises:
        ConfigError: both names are given, or as `omni_sp.DiffusionParallelConfig` raises it.
    """

    def __init__(self, *, vae_patch_parallel_size: int | None = None, **fields: Any) -> None:
        if vae_patch_parallel_size is not None:
            if "vae_parallel" in fields:
                raise ConfigError("vae_patch_parallel_size and vae_parallel say the same: give one of them")
            size = require_int("vae_patch_parallel_size", vae_patch_parallel_size, minimum=1, error=ConfigError)
            fields["vae_parallel"] = size > 1
        super().__init__(**fields)
