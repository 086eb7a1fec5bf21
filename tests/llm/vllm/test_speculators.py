"""Trained speculators inside vLLM: the model's own tokens, and the drafts that a simulation without vLLM makes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch

from omni_sp.llm.speculation import checkpoint
from omni_sp.llm.speculation.heads import Speculator
from omni_sp.testing.components import VOCABULARY_SIZE
from omni_sp.testing.models import save_language_model
from tests.thorough import thorough_only
from training.speculator.data import Sequences
from training.speculator.evaluate import simulate
from training.speculator.settings import Settings
from training.speculator.train import train

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here: make test-vllm", allow_module_level=True)

from tests.llm.vllm.test_engines import (
    COUNT,
    ENVIRONMENT,
    LENGTHS,
    SPECULATES,
    completed,
    engine,
    finished,
    greedy,
    metrics,
    prompts,
    server,
)

pytestmark = pytest.mark.skipif(not SPECULATES, reason="this version's verification of drafts needs Triton")
ANSWER, PLACES, LIMIT = 40, 3, 5
SHIFT: dict[str, Any] = {"enable_shift_parallel": True, "shift_parallel_threshold": 20}


class Trained(NamedTuple):
    """A model with its speculator in a folder beside it, and what the model answers to prompts."""

    model: Any
    folder: Path
    speculator: Speculator
    batch: list[list[int]]
    answers: list[list[int]]


def trained(folder: Path, kind: Literal["lstm", "mlp"], model: Any = None) -> Trained:
    """Train for the answers to these prompts alone, so that some drafts are right.

    ``model``: that of the folder; None saves a Llama there.
    """
    torch.set_num_threads(1)
    if model is None:
        model = save_language_model("llama", folder)
    batch = prompts(*LENGTHS[1:])
    answers = [greedy(model, prompt, ANSWER + PLACES) for prompt in batch]
    sequences = Sequences([prompt + answer for prompt, answer in zip(batch, answers, strict=True)], [*map(len, batch)])
    settings = Settings(kind=kind, steps=40, batch_size=4, learning_rate=1e-2, width=32)
    speculator = train(model, sequences, settings, quiet=True)
    checkpoint.save(folder / "speculator", speculator.config, dict(speculator.named_parameters()))
    return Trained(model, folder, speculator, batch, answers)


@pytest.mark.parametrize(
    ("kind", "tensor", "sequence"),
    [
        ("lstm", 1, 2),
        *(
            pytest.param(*case, marks=thorough_only)
            for case in (("lstm", 1, 1), ("mlp", 1, 1), ("mlp", 1, 2), ("mlp", 2, 1), ("lstm", 2, 2))
        ),
    ],
)
def test_tokens_are_the_models_and_drafts_those_of_a_simulation(
    tmp_path: Path, kind: Literal["lstm", "mlp"], tensor: int, sequence: int
) -> None:
    """With chunks and the shift; then in a batch too large for drafts, and with a temperature."""
    case = trained(tmp_path, kind)
    many = prompts(*[3] * 8)
    states, tokens = torch.randn(6, 128), torch.randint(VOCABULARY_SIZE, (6,))
    result = engine(
        tmp_path,
        [case.batch, many],
        count=ANSWER,
        more={"states": states.tolist(), "state_tokens": tokens.tolist()},
        tensor_parallel_size=tensor,
        ulysses_sequence_parallel_size=sequence,
        disable_log_stats=False,
        speculative_config={
            "method": "arctic",
            "model": str(tmp_path / "speculator"),
            "disable_by_batch_size": LIMIT,
        },
        **(SHIFT if sequence > 1 else {}),
    )
    expected = [answer[:ANSWER] for answer in case.answers]
    assert result["tokens"] == [expected, [greedy(case.model, prompt, ANSWER) for prompt in many]]
    whole = case.speculator.draft(states, tokens, PLACES).tolist()
    # Every rank's part of the speculator drafts what the whole does.
    assert result["drafts"] == [whole] * (tensor * sequence)
    sequences = Sequences(
        [prompt + answer for prompt, answer in zip(case.batch, case.answers, strict=True)], [*map(len, case.batch)]
    )
    simulated = simulate(case.model, case.speculator, sequences, margin=PLACES)
    assert sum(simulated.by_place) > 10, "drafts are tried"
    found = [result["verified"], *result["accepted_by_place"]]
    for mine, theirs in zip(found, [simulated.drafts, *simulated.by_place], strict=True):
        assert abs(mine - theirs) <= 1, (found, simulated)
    before, after = result["steps_after"]
    # None in steps of more than five requests. A few requests may be under way before the others have arrived; drafts
    # in all steps would be as many as this at the least.
    assert after[9] - before[9] < len(many) * ANSWER / (PLACES + 1)
    assert not any(before[6:9]), "nothing by suffix decoding"
    assert abs(before[11] - sum(simulated.by_place)) <= 1
    assert [len(answer) for answer in result["drawn"]] == [ANSWER] * len(case.batch)
    assert all(0 <= token < VOCABULARY_SIZE for answer in result["drawn"] for token in answer)


@thorough_only
@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("sequence", [1, 2])
def test_both_drafters_beside_each_other_give_the_models_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sequence: int, compiles: bool
) -> None:
    if compiles:
        monkeypatch.setitem(ENVIRONMENT, "VLLM_CPU_CI_ENV", "1")  # the graph as it was traced, which is made sooner
    case = trained(tmp_path, "lstm")
    repeated = [*case.batch[:2], case.batch[0] * 5]
    options = {"method": "arctic", "model": str(tmp_path / "speculator"), "enable_suffix_decoding": True}
    result = engine(
        tmp_path,
        [repeated, repeated],
        count=ANSWER,
        aborts=True,
        ulysses_sequence_parallel_size=sequence,
        enable_prefix_caching=True,
        speculative_config=options,
        **({"enforce_eager": False} if compiles else SHIFT if sequence > 1 else {}),
    )
    assert result["tokens"] == [[greedy(case.model, prompt, ANSWER) for prompt in repeated]] * 2
    drafts, _, accepted, head_drafts, _, head_accepted = result["steps"][6:12]
    assert 0 < drafts < accepted
    assert head_drafts > 0
    assert head_accepted > 0


@thorough_only
@pytest.mark.parametrize("sequence", [1, 2])
def test_a_server_drafts_by_a_speculator_and_says_so_on_its_metrics(tmp_path: Path, sequence: int) -> None:
    """``vllm serve`` on one rank, and vLLM's module of the server on two with the shift."""
    case = trained(tmp_path, "mlp")
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(tmp_path)]
    if sequence > 1:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path)]
        command += ["--ulysses-sequence-parallel-size", str(sequence)]
        command += ["--enable-shift-parallel", "--shift-parallel-threshold", "20"]
    options = {"method": "arctic", "model": str(tmp_path / "speculator"), "enable_suffix_decoding": True}
    with server(tmp_path, [*command, "--speculative-config", json.dumps(options)]) as url:
        assert completed(url, tmp_path, case.batch) == [answer[:COUNT] for answer in case.answers]
        assert metrics(url)['omni_sp_llm_drafts_total{by="head"}']


def test_a_speculator_of_another_model_is_one_line_before_anything_starts(tmp_path: Path) -> None:
    save_language_model("llama", tmp_path)
    (tmp_path / "speculator").mkdir()
    config = {"architectures": ["ArcticMLPSpeculatorPreTrainedModel"], "n_predict": 3, "emb_dim": 64, "inner_dim": 32}
    (tmp_path / "speculator" / "config.json").write_text(json.dumps(config | {"vocab_size": VOCABULARY_SIZE}))
    options = json.dumps({"method": "arctic", "model": "speculator"})
    program = Path(sys.executable).with_name("omni-sp")
    done = finished([program, "serve-llm", tmp_path, "--speculative-config", options], tmp_path)
    assert done.returncode == 2
    ours = [line for line in done.stderr.splitlines() if "omni-sp" in line]
    assert ["width of hidden states 64, and the model 128" in line for line in ours] == [True], done.stderr
