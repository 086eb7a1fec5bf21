"""A VAE over ranks: its own, unmodified ``decode`` and ``encode`` run on a picture whose rows are sharded.

The longer of height and width is cut over all ranks of the mesh; of sounds it is their time. Convolutions fetch the
rows that they reach of their neighbours, group norms exchange their moments, and only the result is gathered. So each
rank needs its part of the memory, and there are no tiles whose seams would show.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from omni_sp.collectives import gather_ints, gather_texts
from omni_sp.errors import ShardingError
from omni_sp.mesh import ParallelMesh
from omni_sp.sharding.apply import ShardHandle
from omni_sp.sharding.compiled import is_any_compiled
from omni_sp.sharding.forward_context import ShardedForward, activate, current_forward
from omni_sp.sharding.same_call import ModelText, SameCallCheck
from omni_sp.sharding.tracked import TokenTensor, even_placement, local_shard, to_full_tensors

_METHODS = ("decode", "encode")
Chooses = Callable[[str, torch.Tensor], bool]
"""Whether to share a call: the method, and the latents or the picture. All ranks have to decide alike."""


class VaeHandle(ShardHandle):
    """A VAE whose calls run over all ranks until ``remove()`` is called.

    Args:
        vae: the model.
        mesh: the ranks.
        chooses: whether a call is worth sharing.
        read_weights: reads what this rank has left unread of the VAE's weights.

    Attributes:
        num_shared: calls that ran over all ranks since ``reset_counts()``.
        num_whole: calls that this rank made by itself since then.
    """

    def __init__(
        self, vae: torch.nn.Module, mesh: ParallelMesh, chooses: Chooses, read_weights: Callable[[], None]
    ) -> None:
        super().__init__(vae)
        self._mesh, self._chooses, self._read_weights = mesh, chooses, read_weights
        self._check = SameCallCheck(vae, mesh.world, always=mesh.check, call_token=None, surroundings=None)
        self._text = ModelText(vae)
        self._is_alone = False
        self._has_warned = False
        self.num_shared = self.num_whole = 0

    def reset_counts(self) -> None:
        """Begin anew to count."""
        super().reset_counts()
        self.num_shared = self.num_whole = 0

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While this lasts, this rank makes every call by itself: the other ranks need not make the same."""
        before, self._is_alone = self._is_alone, True
        try:
            yield
        finally:
            self._is_alone = before

    def replace(self, method: str) -> None:
        """Replace a method of this VAE, not of its class.

        Args:
            method: "decode" or "encode".
        """
        vae = self.model
        original = getattr(vae, method)
        argument = next(iter(inspect.signature(original).parameters))

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            picture: Any = args[0] if args else kwargs.get(argument)
            if not self._is_shared(method, picture):
                self.num_whole += 1
                return original(*args, **kwargs)
            self.num_shared += 1
            dim = _longer_side(picture)
            self._check.before_forward((), {argument: picture}, None)
            # Attention within a picture has one head: each rank attends from its own tokens to all of them.
            with activate(ShardedForward(mesh=self._mesh, strategy=None, tokens={}, gathers=self.gathers)):
                sharded = _sharded(picture, dim, self._mesh)
                args, kwargs = ((sharded, *args[1:]), kwargs) if args else ((), {**kwargs, argument: sharded})
                return _to_full_output(original(*args, **kwargs))

        if method in vars(vae):
            self.on_remove(lambda: setattr(vae, method, original))
        else:
            self.on_remove(lambda: delattr(vae, method))
        setattr(vae, method, call)

    def _is_shared(self, method: str, picture: Any) -> bool:
        """Whether a call runs over all ranks. Collective where shapes do not forbid it: one rank's VAE may be tiled."""
        if self._is_alone or self._mesh.world.size == 1 or current_forward() is not None:
            return False
        if not isinstance(picture, torch.Tensor) or not picture.is_floating_point() or not 3 <= picture.ndim <= 5:
            return False
        if picture.shape[_longer_side(picture)] < 2 or not self._chooses(method, picture):
            return False
        reason = self._reason_for_whole()
        self._require_same_on_all(method, reason)
        if reason is not None and not self._has_warned and self._mesh.rank == 0:
            self._has_warned = True
            warnings.warn(
                f"{type(self.model).__name__}.{method}() runs whole on each rank, because {reason}; over the ranks it "
                "is exact, without tiles, and each needs its part of the memory",
                stacklevel=3,
            )
        return reason is None

    def _require_same_on_all(self, method: str, reason: str | None) -> None:
        """Refuse a call that some ranks would make whole, or with other weights. A collective call."""
        world = self._mesh.world
        if "fake" in world.backends.values():
            return
        weights = "not compared"
        if reason is None:
            self._read_weights()  # one rank may have left them unread, and all need them now
            weights = self._text.checksum()
        own = reason or "nothing", weights
        by_rank = list(zip(*gather_ints([zlib.crc32(text.encode()) for text in own], world), strict=True))
        for text, checksums, difference, advice in zip(
            own,
            by_rank,
            ("in different ways, since they have other reasons to run it whole", "with different weights"),
            ("do the same to it", "load the same weights into it"),
            strict=True,
        ):
            if len(set(checksums)) > 1:
                shown = ", ".join(f"rank {rank}: {one}" for rank, one in enumerate(gather_texts(text, world)))
                raise ShardingError(
                    f"the ranks would run {type(self.model).__name__}.{method}() {difference}: {shown}. Every rank "
                    f"must {advice}"
                )

    def _reason_for_whole(self) -> str | None:
        vae = self.model
        if getattr(vae, "use_tiling", False):
            return "its tiling is enabled (disable_tiling() ends that)"
        if is_any_compiled(vae):
            return "it is compiled"
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in vae.parameters()):
            return "gradients are enabled (torch.no_grad() ends that)"
        return None


def shard_vae(
    vae: torch.nn.Module,
    mesh: ParallelMesh,
    chooses: Chooses = lambda method, picture: True,
    read_weights: Callable[[], None] = lambda: None,
) -> VaeHandle:
    """Let the ``decode`` and ``encode`` of this VAE run over all ranks of ``mesh.world``.

    Every rank makes the same calls, and each gets the whole result. Calls stay whole where tiling is enabled, the VAE
    is compiled, or gradients are recorded; a warning says so once.

    Args:
        vae: one of diffusers' autoencoders.
        mesh: the ranks.
        chooses: whether a call is worth sharing, by what all ranks know.
        read_weights: reads what this rank has left unread of the VAE's weights, before ranks compare them.

    Raises:
        ShardingError: the VAE is parallelized already.
    """
    handle = VaeHandle(vae, mesh, chooses, read_weights)
    handle.attach()
    for method in _METHODS:
        if callable(getattr(vae, method, None)):
            handle.replace(method)
    return handle


def _longer_side(picture: torch.Tensor) -> int:
    """The dim to cut: the longer of height and width, or of a sound its time. Few latents lie along a video's time."""
    last = picture.ndim - 1
    return last - 1 if picture.ndim > 3 and picture.shape[-2] >= picture.shape[-1] else last


def _sharded(picture: torch.Tensor, dim: int, mesh: ParallelMesh) -> TokenTensor:
    placement = even_placement(picture.shape[dim], mesh.world.size)
    return TokenTensor(local_shard(picture, dim, placement, mesh.world).contiguous(), dim, placement, mesh.world)


def _to_full_output(output: Any) -> Any:
    """An output with full tensors, also in the attributes of distributions."""
    for item in tree_flatten(output)[0]:
        if not isinstance(item, torch.Tensor) and type(item).__module__.startswith("diffusers."):
            attributes = vars(item)
            attributes.update({name: to_full_tensors(value) for name, value in attributes.items()})
    return to_full_tensors(output)
