"""SwiftKV inside vLLM: the tokens of the reference, with late layers computed for sampled tokens alone."""

from __future__ import annotations

import importlib.util
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from omni_sp.testing.models import save_swiftkv_model
from tests.thorough import thorough_only

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here: make test-vllm", allow_module_level=True)

from omni_sp.llm.vllm.step_metrics import StepCounts
from tests.llm.vllm.test_engines import (
    COUNT,
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

CHUNK = 64  # tokens of a step, at most


@pytest.mark.parametrize(
    ("kind", "group", "tensor", "sequence", "suffix"),
    [
        ("qwen3", 2, 1, 2, True),
        *(
            pytest.param(kind, group, tensor, sequence, suffix, marks=thorough_only)
            for kind in ("llama", "qwen2", "qwen3")
            for group, tensor, sequence, suffix in (
                (1, 1, 1, False),
                (2, 1, 1, True),
                (1, 1, 2, True),
                (2, 1, 2, False),
                (1, 2, 2, kind == "qwen2"),
                (2, 2, 2, kind == "llama"),
            )
        ),
        pytest.param("llama", 1, 2, 1, False, marks=thorough_only),
    ],
)
def test_tokens_are_the_references_and_late_layers_see_sampled_tokens_alone(
    tmp_path: Path, kind: str, group: int, tensor: int, sequence: int, suffix: bool
) -> None:
    """One long prompt in chunks, then several with a cached prefix, by Ulysses and tensor parallelism in turns."""
    suffix = suffix and SPECULATES
    kv_heads = 1 if kind == "qwen3" else 2
    with_replaced = kind != "llama"  # the matrices of the teacher's late layers, which are passed over
    model = save_swiftkv_model(
        kind, tmp_path, num_key_value_heads=kv_heads, num_layers=5, key_value_group_size=group,
        with_replaced=with_replaced,
    )  # fmt: skip
    *short, long = prompts(*LENGTHS)
    batches = [[long], [*short, [*long[:100], 9, 9]], [long]]
    options: dict[str, Any] = {"tensor_parallel_size": tensor, "ulysses_sequence_parallel_size": sequence}
    if sequence > 1:
        options |= {"enable_shift_parallel": True, "shift_parallel_threshold": 20}
    if suffix:
        options["speculative_config"] = {"method": "suffix", "num_speculative_tokens": 8}
    result = engine(tmp_path, batches, enable_prefix_caching=True, **options)
    assert result["tokens"] == [[greedy(model, prompt, COUNT) for prompt in batch] for batch in batches]
    first, _, last = (StepCounts(*counts) for counts in result["steps_after"])
    # Of the prompt alone, each chunk's last token is taken along. After it, whatever runs is sampled.
    chunks = -(-len(long) // CHUNK)
    assert first.early_tokens - first.late_tokens == len(long) - chunks
    assert first.early_tokens >= len(long) + COUNT - 1
    assert last.late_tokens < last.early_tokens / 2
    assert bool(last.ulysses_steps) == bool(last.tensor_steps) == (sequence > 1)
    assert not suffix or last.accepted_tokens
    ranks, head_dim = tensor * sequence, model.config.head_dim if kind == "qwen3" else 32
    stored = 2 + -(-3 // group)  # layers of which keys and values are stored
    for rank in result["memory"]:
        assert rank["kept_per_token"] == stored * 2 * max(1, kv_heads // ranks) * head_dim * 4


@thorough_only
def test_vllm_serve_needs_no_flag_and_refuses_logprobs_of_prompts(tmp_path: Path) -> None:
    model = save_swiftkv_model("llama", tmp_path)
    with server(tmp_path, [str(Path(sys.executable).with_name("vllm")), "serve", str(tmp_path)]) as url:
        batch = prompts(*LENGTHS)
        assert completed(url, tmp_path, batch) == [greedy(model, one, COUNT) for one in batch]
        counts = metrics(url)
        early, late = (counts[f'omni_sp_llm_swiftkv_tokens_total{{layers="{name}"}}'] for name in ("early", "late"))
        assert 0 < late < early / 2
        body = {"model": str(tmp_path), "prompt": batch[1], "max_tokens": 1, "prompt_logprobs": 1}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            urllib.request.urlopen(request, timeout=60)
        assert "--kv-sharing-fast-prefill" in refused.value.read().decode()
        assert completed(url, tmp_path, batch[:1]) == [greedy(model, batch[0], COUNT)]


@thorough_only
@pytest.mark.parametrize(
    ("lacks", "options", "message"),
    [
        ("layers.3.self_attn.v_proj_swiftkv", {}, "lack 1 weights of SwiftKV; the first is v of model.layers.3"),
        ("", {"enable_lora": True}, "SwiftKV does not run with LoRA"),
        ("", {"num_key_value_layers": 4}, "num_key_value_layers=4 of 4 layers"),
    ],
)
def test_what_does_not_run_is_refused_by_name(
    tmp_path: Path, lacks: str, options: dict[str, Any], message: str
) -> None:
    save_swiftkv_model("llama", tmp_path)
    if lacks:
        weights = load_file(tmp_path / "model.safetensors")
        kept = {name: weight for name, weight in weights.items() if lacks not in name}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if "num_key_value_layers" in options:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | options))
        options = {}
    case = {"options": {"model": str(tmp_path), "max_model_len": 128, **options}, "batches": [], "aborts": False}
    (tmp_path / "case.json").write_text(json.dumps(case | {"count": 1}))
    done = finished([sys.executable, "-m", "tests.llm.vllm.run_vllm", "case.json", "result.json"], tmp_path)
    assert done.returncode
    assert message in done.stdout + done.stderr
