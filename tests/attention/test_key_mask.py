"""Masks that every rank holds whole: masked keys are neither sent nor seen by a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from omni_sp import ParallelMesh, ShardingError, UnsupportedAttentionError
from omni_sp.attention import SequenceLayout, WholeKeyMask, local_attention, sequence_parallel_attention
from omni_sp.attention.kernels import Kernel, load_kernel
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import attention, relative_error, split_tokens

LENGTHS = (9, 0, 8, 7)
DEGREES = [(1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (2, 2)]


def prefixes(*kept: int) -> Callable[[int], Tensor]:
    """Rows that begin with so many keys that count."""
    return lambda tokens: torch.arange(tokens)[None] < torch.tensor(kept)[:, None]


def without_first(tokens: int) -> Tensor:
    return torch.arange(tokens)[None].expand(3, -1) >= 4


def without_some(tokens: int) -> Tensor:
    return (torch.arange(tokens)[None] + torch.arange(3)[:, None]) % 3 > 0


def nothing(tokens: int) -> Tensor:
    return torch.zeros(3, tokens, dtype=torch.bool)


def everything(tokens: int) -> Tensor:
    return torch.ones(3, tokens, dtype=torch.bool)


MASKS: dict[str, Callable[[int], Tensor]] = {
    "a prefix": prefixes(7, 7, 7),
    "a prefix, one row for all": prefixes(7),
    "prefixes of other lengths": prefixes(7, 2, 7),
    "a row without keys": prefixes(7, 0, 3),
    "without the first keys": without_first,
    "without some, other ones in each row": without_some,
    "nothing": nothing,
    "everything": everything,
}


@dataclass
class Seen:
    """What a kernel was called with.

    Attributes:
        masks: how many calls had a mask.
        calls: (rows, keys) of each call.
        bytes: that this rank sent.
    """

    masks: int
    calls: list[tuple[int, int]]
    bytes: int


def watched(seen: Seen) -> Kernel:
    plain = load_kernel("cpu_flash")

    def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *options: object) -> tuple[Tensor, Tensor]:
        seen.masks += mask is not None
        seen.calls.append((len(key), key.shape[1]))
        return plain.run(query, key, value, mask, *options)  # type: ignore[arg-type]

    return Kernel("watched", plain.capabilities, run)


def tensors(num_ranks: int, name: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(2)
    tokens = sum(LENGTHS[:num_ranks])
    query = torch.randn(3, tokens, 4, 16, generator=generator)
    key, value = torch.randn(2, 3, tokens, 2, 16, generator=generator)
    return query, key, value, None if name is None else MASKS[name](tokens)


def attend_under(mesh: ParallelMesh, name: str | None) -> tuple[Tensor, Seen]:
    from omni_sp.attention.kernels import registry

    query, key, value, mask = tensors(mesh.world_size, name)
    lengths, rank = LENGTHS[: mesh.world_size], mesh.sequence.rank
    seen = Seen(0, [], 0)
    registry._REGISTERED["watched"] = watched(seen)
    axes = (mesh.ulysses, mesh.ring)
    for axis in axes:
        axis.traffic.reset()
    try:
        out = sequence_parallel_attention(
            *(split_tokens(x, lengths)[rank] for x in (query, key, value)),
            mesh=mesh,
            key_mask=None if mask is None else WholeKeyMask(mask, lengths),
            layout=SequenceLayout(lengths, lengths),
            kernel="watched",
        )
    finally:
        del registry._REGISTERED["watched"]
    seen.bytes = sum(sum(axis.traffic.bytes.values()) for axis in axes)
    return out, seen


@pytest.mark.parametrize(("ulysses", "ring"), DEGREES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_masked_keys_are_left_out(ranks: RankPool, name: str, ulysses: int, ring: int) -> None:
    query, key, value, mask = tensors(ulysses * ring, name)
    assert mask is not None
    answers = ranks.run(attend_under, name, ulysses=ulysses, ring=ring)
    got = torch.cat([out for out, _ in answers], dim=1)
    wanted = attention(query, key, value, key_mask=mask.expand(3, -1))
    assert not got.isnan().any()
    assert relative_error(got, wanted) <= 2e-6
    assert torch.equal(got[~mask.expand(3, -1).any(-1)], torch.zeros_like(got[~mask.expand(3, -1).any(-1)]))
    unmasked = ranks.run(attend_under, None, ulysses=ulysses, ring=ring)
    for (_, seen), (_, without_mask) in zip(answers, unmasked, strict=True):
        assert not seen.masks
        if name == "everything":
            assert seen == without_mask
        assert seen.bytes <= without_mask.bytes
        assert sum(rows * keys for rows, keys in seen.calls) <= sum(rows * keys for rows, keys in without_mask.calls)
    if ring == 1:
        for _, seen in answers:
            assert sum(rows * keys for rows, keys in seen.calls) == mask.expand(3, -1).sum()
            if name in ("a prefix", "a prefix, one row for all", "without the first keys"):
                # Rows that are alike are one call.
                assert len(seen.calls) == 1
    if name == "nothing":
        assert not any(seen.calls for _, seen in answers)


def test_consecutive_keys_are_not_copied() -> None:
    whole = WholeKeyMask(prefixes(6, 2)(9), (4, 5))
    assert whole.kept_lengths == (4, 2)
    assert whole.rows(0, 1, torch.device("cpu")) == ((0, 1, slice(0, 4)), (1, 2, slice(0, 2)))
    assert whole.rows(0, 2, torch.device("cpu")) == ((0, 1, slice(0, 6)), (1, 2, slice(0, 2)))
    assert whole.rows(1, 2, torch.device("cpu")) == ((0, 1, slice(0, 2)), (1, 2, slice(0, 0)))


def test_local_attention_takes_a_tensor() -> None:
    x = torch.zeros(1, 4, 2, 8)
    whole: Any = WholeKeyMask(torch.ones(1, 4, dtype=torch.bool), (4,))
    with pytest.raises(UnsupportedAttentionError, match="pass its tensor here"):
        local_attention(x, x, x, key_mask=whole)


def refusals(mesh: ParallelMesh) -> list[str]:
    x, messages = torch.zeros(3, 4, 2, 8), []
    of_rank = torch.tensor([[True] * 7 + [mesh.rank == 0]])
    masks: list[Callable[[], WholeKeyMask]] = [
        lambda: WholeKeyMask(torch.ones(3, 7, dtype=torch.bool), (4, 4)),
        lambda: WholeKeyMask(torch.ones(3, 8), (4, 4)),
        lambda: WholeKeyMask(torch.ones(2, 8, dtype=torch.bool), (4, 4)),
        lambda: WholeKeyMask(torch.ones(3, 8, dtype=torch.bool), (3, 5)),
        lambda: WholeKeyMask(of_rank, (4, 4)),
    ]
    for make in masks:
        try:
            sequence_parallel_attention(x, x, x, mesh=mesh, key_mask=make())
        except (ShardingError, UnsupportedAttentionError) as error:
            messages.append(str(error))
    return messages


def test_masks_that_do_not_fit_are_refused(ranks: RankPool) -> None:
    for messages in ranks.run(refusals, ulysses=2):
        wanted = [
            "mask (3, 7) of torch.bool: give bool of shape (batch, 8)",
            "mask (3, 8) of torch.float32: give bool",
            "a mask of 2 rows for keys (3, 4, 2, 8)",
            "the mask is for ranks that hold (3, 5) keys, they hold (4, 4)",
        ]
        for message, beginning in zip(messages, wanted, strict=False):
            assert message.startswith(beginning)
        # The fifth differs between the ranks, which is asked about as they exchange their lengths.
        assert "the ranks disagree about key_mask" in messages[4]
