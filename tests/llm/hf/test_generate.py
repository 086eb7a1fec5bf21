"""Greedy answers over ranks, token for token those of transformers' own generate in one process."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from omni_sp.llm.hf.model import parallelize
from omni_sp.mesh import ParallelMesh
from omni_sp.testing.ranks import RankPool
from tests.llm.hf import tiny

LAYOUTS = [(2, 1), (1, 2), (2, 2), (3, 1), (1, 3)]
LENGTHS = (1, 7, 13, 34, 161)
NEW = 6
CHUNKS = ((13, 4), (13, 1), (34, 13), (161, 50))
PADDED = (23, 9, 30, 1)


@cache
def reference(name: str) -> Any:
    return tiny.model(name)


def alone(name: str, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    """What transformers answers."""
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    return reference(name).generate(ids, attention_mask=mask, **options)  # type: ignore[no-any-return]


@cache
def answers(name: str) -> list[torch.Tensor]:
    return [alone(name, tiny.prompt(tokens)) for tokens in LENGTHS]


@cache
def unpadded(side: str) -> torch.Tensor:
    """The answer to each sequence of the padded batch, given alone."""
    ids, mask = tiny.padded(PADDED, side)
    sequences = [ids[index][mask[index].bool()][None] for index in range(len(PADDED))]
    return torch.cat([alone("qwen2, bias", sequence)[:, -NEW:] for sequence in sequences])


def on_ranks_generate(mesh: ParallelMesh, name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    handle = parallelize(tiny.model(name), mesh)
    at_once = [handle.generate(tiny.prompt(tokens), max_new_tokens=NEW) for tokens in LENGTHS]
    chunked = [
        handle.generate(tiny.prompt(tokens), max_new_tokens=NEW, prefill_chunk=chunk) for tokens, chunk in CHUNKS
    ]
    return at_once, chunked


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize(("ulysses", "ring"), LAYOUTS)
def test_answers_are_those_of_one_process_at_once_and_in_chunks(
    ranks: RankPool, name: str, ulysses: int, ring: int
) -> None:
    wanted = dict(zip(LENGTHS, answers(name), strict=True))
    assert len({token for answer in wanted.values() for token in answer[0, -NEW:].tolist()}) > 5, "says too little"
    for at_once, chunked in ranks.run(on_ranks_generate, name, ulysses=ulysses, ring=ring):
        for tokens, answer in zip(LENGTHS, at_once, strict=True):
            assert answer.equal(wanted[tokens])
        for (tokens, _), answer in zip(CHUNKS, chunked, strict=True):
            assert answer.equal(wanted[tokens])


def on_ranks_generate_padded(mesh: ParallelMesh, side: str, chunk: int | None) -> torch.Tensor:
    ids, mask = tiny.padded(PADDED, side)
    handle = parallelize(tiny.model("qwen2, bias"), mesh)
    return handle.generate(ids, attention_mask=mask, max_new_tokens=NEW, prefill_chunk=chunk)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize(("ulysses", "ring"), LAYOUTS)
def test_sequences_of_a_padded_batch_are_answered_as_each_is_alone(
    ranks: RankPool, side: str, chunk: int | None, ulysses: int, ring: int
) -> None:
    ids, _ = tiny.padded(PADDED, side)
    for answer in ranks.run(on_ranks_generate_padded, side, chunk, ulysses=ulysses, ring=ring):
        assert answer[:, : ids.shape[1]].equal(ids)
        assert answer[:, ids.shape[1] :].equal(unpadded(side))


def on_ranks_end(mesh: ParallelMesh, ends: int | list[int]) -> torch.Tensor:
    handle = parallelize(tiny.model("qwen3, norms"), mesh)
    return handle.generate(tiny.prompt(13, batch=3), max_new_tokens=12, eos_token_id=ends, pad_token_id=2)


def test_a_sequence_that_has_ended_is_padded_until_the_last_one_ends(ranks: RankPool) -> None:
    ids = tiny.prompt(13, batch=3)
    free = alone("qwen3, norms", ids, max_new_tokens=12)[:, 13:]
    for ends in (int(free[0, 2]), [int(free[0, 2]), int(free[1, 4]), int(free[2, 3])]):
        wanted = alone("qwen3, norms", ids, max_new_tokens=12, eos_token_id=ends, pad_token_id=2)
        assert (wanted[0] == 2).any()
        for answer in ranks.run(on_ranks_end, ends, ulysses=2):
            assert answer.equal(wanted)
    assert wanted.shape[1] < 13 + 12


class RecordingStreamer:
    """A streamer that records its calls, and the size of the cache at each of them."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.values: list[torch.Tensor] = []
        self.bytes: set[int] = set()
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value)
        self.bytes.add(self.handle.cache_bytes())

    def end(self) -> None:
        self.ended = True


def on_ranks_count(mesh: ParallelMesh, tokens: int, new: int, chunk: int | None) -> dict[str, Any]:
    handle = parallelize(tiny.model("llama, one kv head"), mesh)
    ids = tiny.prompt(tokens, batch=2)
    recorder = RecordingStreamer(handle)
    handle.generate(ids, max_new_tokens=1, prefill_chunk=chunk)
    mesh.sequence.traffic.reset()
    handle.generate(ids, max_new_tokens=1, prefill_chunk=chunk)
    prefill = dict(mesh.sequence.traffic.calls)
    mesh.sequence.traffic.reset()
    for axis in (mesh.ring, mesh.ulysses):
        axis.traffic.reset()
    answer = handle.generate(ids, max_new_tokens=new, prefill_chunk=chunk, streamer=recorder)
    calls = mesh.sequence.traffic.calls
    streamed = torch.cat([recorder.values[0], torch.stack(recorder.values[1:], 1)], 1)
    return {
        "bytes": recorder.bytes,
        "after": handle.cache_bytes(),
        "streamed": streamed.equal(answer) and recorder.ended,
        "a step": {kind: (calls[kind] - prefill.get(kind, 0)) / (new - 1) for kind in calls},
    }


@pytest.mark.parametrize(("ulysses", "ring"), LAYOUTS)
@pytest.mark.parametrize("chunk", [None, 9])
def test_each_rank_stores_its_share_of_the_cache_and_a_step_costs_one_gather_a_layer(
    ranks: RankPool, chunk: int | None, ulysses: int, ring: int
) -> None:
    tokens, new = 25, 11
    # Keys and values, layers, batch, one head of 8, 4 bytes; the last new token is never an input.
    token_bytes = 2 * 2 * 2 * 8 * 4
    stored = []
    for answer in ranks.run(on_ranks_count, tokens, new, chunk, ulysses=ulysses, ring=ring):
        # When the streamer gets the prompt nothing is allocated; the first layer's first write allocates everything.
        (num_bytes,) = answer["bytes"] - {0}
        assert answer["after"] == 0
        assert answer["streamed"]
        assert answer["a step"] == {"gather": 2, "gather_ints": 1} | ({"exchange": 0} if chunk else {})
        stored.append(num_bytes // token_bytes)
        assert num_bytes % token_bytes == 0
    assert sum(stored) == tokens + new - 1
    assert max(stored) - min(stored) <= 1
