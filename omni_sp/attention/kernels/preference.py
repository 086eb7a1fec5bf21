"""Which kernel "auto" takes: by device, and by the number of tokens.

Nothing of this has been measured with this library yet. The grounds are published figures:

- H100, TFLOP/s forward at head_dim 128 and 512 / 1k / 2k / 4k / 16k tokens: FlashAttention-2 309 / 350 / 362 / 368 /
  370, cuDNN 497 / 574 / 617 / 609 / 595, FlashAttention-3 467 / 565 / 625 / 638 / 648. At head_dim 256 the latter leads
  from 1k on (arXiv 2407.08608, figure 5). In training torch's cuDNN is 1.7 to 2.3 times as fast as torch's flash
  (huggingface/transformers pull request 48163).
- B200: FlashAttention-4 is up to 1.3 times as fast as cuDNN 9.13 (arXiv 2603.05451), but cuDNN 9.19 1.24 to 1.98 times
  as fast as FlashAttention-4 on eleven shapes of diffusion models (sgl-project/sglang pull request 33655).
- A100, A10G, L40S and RTX PRO 6000: torch's cuDNN is 0.8 to 1.2 times as fast as its flash, and the sources disagree
  (transformers 48163, pytorch/pytorch pull request 192799, sglang 36494). Flash needs no plan for each new shape.
- Below 512 tokens there are no figures, so it is torch's flash.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch

from omni_sp.attention.kernels.base import KernelCall

_CUDNN_BEFORE_FLASH_ATTN_4 = 91900


class _Preference(NamedTuple):
    """A kernel, and the calls that it is taken for, if it can serve them and is installed.

    Attributes:
        since: the first compute capability.
        before: the one behind the last.
        min_tokens: the fewest queries and keys.
        head_dims: those that its authors speak of; None for all that it declares.
    """

    kernel: str
    since: tuple[int, int] = (0, 0)
    before: tuple[int, int] = (100, 0)
    min_tokens: int = 0
    head_dims: tuple[int, ...] | None = None


_AMPERE, _HOPPER, _BLACKWELL, _CONSUMER_BLACKWELL = (8, 0), (9, 0), (10, 0), (12, 0)
_PREFERENCES = (
    _Preference("cpu_flash"),
    _Preference("flash_attn_3", _HOPPER, _BLACKWELL, min_tokens=1024),
    _Preference("flash_attn_4", _BLACKWELL, _CONSUMER_BLACKWELL, min_tokens=512, head_dims=(64, 96, 128)),
    _Preference("cuda_cudnn", _HOPPER, _CONSUMER_BLACKWELL, min_tokens=512),
    _Preference("cuda_flash", _AMPERE),
    _Preference("cuda_efficient"),
    _Preference("math"),
)


@cache
def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """That of an NVIDIA GPU; None for other devices."""
    # The numbers of AMD's GPUs mean something else.
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def preferred_kernels(call: KernelCall) -> Iterator[str]:
    """The names of kernels for a call, the best first; not all of them can serve it or are installed."""
    # Where it is not known, as with AMD's GPUs, there is torch's flash.
    capability = call.compute_capability or _AMPERE
    for name, since, before, min_tokens, head_dims in _PREFERENCES:
        if not since <= capability < before or call.num_tokens < min_tokens:
            continue
        if head_dims is not None and call.head_dim not in head_dims:
            continue
        if name == "flash_attn_4" and (torch.backends.cudnn.version() or 0) >= _CUDNN_BEFORE_FLASH_ATTN_4:
            continue
        yield name
