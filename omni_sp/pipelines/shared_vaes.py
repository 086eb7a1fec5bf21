"""Which of a pipeline's autoencoders run over all ranks, and in which calls."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from omni_sp.mesh import ParallelMesh
from omni_sp.pipelines.capabilities import inspect_pipeline
from omni_sp.pipelines.lazy_components import read_weights
from omni_sp.sharding import VaeHandle, shard_vae

_PACKAGE = "diffusers.models.autoencoders."
_LARGE = 1024
"""Pixels along the longer side from which on a picture is worth the exchanges, and the weights on every rank."""


class SharedVaes:
    """The autoencoders of a pipeline, over all ranks of a mesh as its ``vae_parallel`` says.

    All that decides whether a call is shared is the same on all ranks: the configuration, the pipeline, and shapes.

    Args:
        pipe: a pipeline; a transformer alone has no autoencoder.
        mesh: the ranks.

    Attributes:
        handles: one for each autoencoder; none where nothing is to be shared.
    """

    def __init__(self, pipe: Any, mesh: ParallelMesh) -> None:
        self._mode, self._world_size = mesh.config.vae_parallel, mesh.world_size
        self.handles: list[VaeHandle] = []
        vaes = [model for model in (getattr(pipe, "components", None) or {}).values() if _is_autoencoder(model)]
        if not vaes or self._mode is False or mesh.world_size == 1:
            return
        self._capabilities = inspect_pipeline(pipe)
        sample_size = getattr(pipe, "default_sample_size", None)
        self._default_side = sample_size * self._capabilities.vae_multiple if isinstance(sample_size, int) else _LARGE
        try:
            for vae in vaes:
                self.handles.append(shard_vae(vae, mesh, self._is_worth_it, functools.partial(read_weights, vae)))
        except BaseException:
            for handle in self.handles:
                handle.remove()
            raise

    @property
    def num_ranks(self) -> int:
        """How many ranks worked on what was decoded and encoded since the handles' counts began."""
        return self._world_size if any(handle.num_shared for handle in self.handles) else 1

    def are_expected(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the ranks may decode together in a call of the pipeline, so that none may stop before that.

        Args:
            arguments: of the pipeline's ``__call__``.
        """
        if not self.handles or self._mode is True or self._capabilities.makes_videos:
            return bool(self.handles)
        given = {**self._capabilities.parameters, **arguments}
        sides = [side for name in ("height", "width") if isinstance(side := given.get(name), int)]
        return max(sides, default=self._default_side) >= _LARGE

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While this lasts, this rank decodes and encodes by itself: the others need not do the same."""
        with ExitStack() as stack:
            for handle in self.handles:
                stack.enter_context(handle.alone())
            yield

    def read_weights(self) -> None:
        """Read weights that were left unread, where every call is going to need them."""
        if self.are_expected({"height": 1, "width": 1}):
            for handle in self.handles:
                read_weights(handle.model)

    def _is_worth_it(self, method: str, picture: torch.Tensor) -> bool:
        is_video, is_sound = picture.ndim == 5 and picture.shape[2] > 1, picture.ndim == 3
        if self._mode is True or is_video or is_sound:
            return self._mode is True or is_video
        return max(picture.shape[-2:]) * (self._capabilities.vae_multiple if method == "decode" else 1) >= _LARGE


def _is_autoencoder(model: Any) -> bool:
    return type(model).__module__.startswith(_PACKAGE) and callable(getattr(model, "decode", None))
