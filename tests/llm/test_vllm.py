"""Inside vLLM: the same tokens as transformers, whichever way a step runs, through every door."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from tests.engine.processes import becomes_true
from tests.llm.folders import greedy, prompts, save

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here: make test-vllm", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 280.0
COUNT = 12
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
SMALL = {"dtype": "float32", "max_model_len": 256, "max_num_batched_tokens": 64, "max_num_seqs": 8}
FLAGS = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A program to its end, and nothing of it afterwards."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def engine(folder: Path, batches: list[list[list[int]]], **options: Any) -> dict[str, Any]:
    """What an engine says to these prompts."""
    case = {"options": {"model": str(folder), **SMALL, **options}, "batches": batches, "count": COUNT}
    (folder / "case.json").write_text(json.dumps(case))
    run(["-m", "tests.llm.run_vllm", "case.json", "result.json"], folder)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def test_greedy_tokens_equal_transformers_in_both_modes_and_with_a_cached_prefix(tmp_path: Path) -> None:
    """Qwen3, one kv head for two ranks, prompts in chunks; a request begins by Ulysses and goes on by heads."""
    model = save(tmp_path, "Qwen3", num_key_value_heads=1)
    first = prompts(1, 7, 13, 34, 161)
    again = [first[4] + [5, 6, 7], [*first[4][:100], 9, 9]]
    result = engine(
        tmp_path,
        [first, again],
        ulysses_sequence_parallel_size=2,
        enable_shift_parallel=True,
        shift_parallel_threshold=20,
        enable_prefix_caching=True,
    )
    assert result["said"] == [[greedy(model, prompt, COUNT) for prompt in batch] for batch in (first, again)]
    ulysses_steps, ulysses_tokens, tensor_steps, _, models = result["steps"]
    assert ulysses_steps
    assert tensor_steps
    assert models == 1
    computed = sum(map(len, first)) + sum(map(len, again))
    assert ulysses_tokens < computed, "no prefix was taken from the cache"


def test_two_by_two_holds_half_the_weights_once_and_a_quarter_of_the_cache(tmp_path: Path) -> None:
    """Qwen2 with biases, tensor × sequence parallel 2 × 2, n-gram speculation beside it."""
    model = save(tmp_path, "Qwen2", num_key_value_heads=2)
    batch = prompts(1, 7, 13, 34, 161)
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    result = engine(
        tmp_path,
        [batch],
        tensor_parallel_size=2,
        ulysses_sequence_parallel_size=2,
        enable_shift_parallel=True,
        shift_parallel_threshold=20,
        speculative_config=speculation,
    )
    assert result["said"] == [[greedy(model, prompt, COUNT) for prompt in batch]]
    assert result["steps"][0]
    assert result["steps"][2]
    config = model.config
    hidden, inner = config.hidden_size, config.intermediate_size
    head_dim = hidden // config.num_attention_heads
    layer = hidden * (2 * hidden + 2 * config.num_key_value_heads * head_dim) + 3 * hidden * inner
    matrices = config.num_hidden_layers * layer * 4
    for rank in result["held"]:
        # Shift parallelism adds nothing: both ways of a step use these.
        assert rank["matrices"] == matrices // 2
        # 2 kv heads over 4 ranks: one each, as vLLM's own tensor parallelism keeps them.
        assert rank["kept_per_token"] == config.num_hidden_layers * 2 * head_dim * 4


@contextlib.contextmanager
def server(folder: Path, arguments: list[str]) -> Iterator[str]:
    """A running server's address; afterwards none of its processes is there."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = (folder / "log").open("w")
    command = [*arguments, *FLAGS, "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT)
    everybody: list[psutil.Process] = []
    try:
        until = time.monotonic() + PATIENCE_S
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, (folder / "log").read_text()[-4000:]
            assert time.monotonic() < until, (folder / "log").read_text()[-4000:]
            time.sleep(0.5)
        everybody = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        log.close()
        gone = becomes_true(lambda: not any(map(_runs, everybody)), 20.0)
        for one in everybody:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    assert gone


def _runs(process: Any) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def chat(url: str, model: Path, words: str) -> str:
    """A streamed answer, through OpenAI's client."""
    from openai import OpenAI

    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        pieces = client.chat.completions.create(
            model=str(model), messages=[{"role": "user", "content": words}], max_tokens=8, temperature=0, stream=True
        )
        return "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)


def expected(model: Any, folder: Path, words: str) -> str:
    """The same answer by transformers."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": words}], tokenize=True, return_dict=True)[
        "input_ids"
    ]
    said = greedy(model, list(ids), 8)
    if tokenizer.eos_token_id in said:
        said = said[: said.index(tokenizer.eos_token_id)]
    return str(tokenizer.decode(said, skip_special_tokens=True))


WORDS = "a red circle on a blue cat in the snow walks on the star"


@pytest.mark.parametrize(
    ("kind", "door"),
    [
        ("Llama", "serve --ulysses-sequence-parallel-size 2 --enable-shift-parallel --shift-parallel-threshold 8"),
        ("Mistral", "api_server --tensor-parallel-size 2 --sequence-parallel-size 2"),
    ],
)
def test_stock_commands_with_our_flags_answer_a_chat(tmp_path: Path, kind: str, door: str) -> None:
    model = save(tmp_path, kind, num_key_value_heads=2)
    name, *flags = door.split()
    command = {
        "serve": [str(Path(sys.executable).with_name("vllm")), "serve", str(tmp_path)],
        "api_server": [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path)],
    }[name]
    with server(tmp_path, [*command, *flags]) as url:
        assert chat(url, tmp_path, WORDS).strip() == expected(model, tmp_path, WORDS).strip()
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
    assert 'omni_sp_llm_steps_total{mode="ulysses"}' in metrics
    by_heads = next(line for line in metrics.splitlines() if line.startswith('omni_sp_llm_steps_total{mode="tensor"}'))
    assert (float(by_heads.split()[-1]) > 0) == (name == "serve")


def test_what_cannot_be_is_one_line_before_anything_starts(tmp_path: Path) -> None:
    save(tmp_path, "Llama", num_key_value_heads=2)
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}')
    serve = ["-m", "vllm.entrypoints.cli.main", "serve"]
    for arguments, told in (
        ([str(tmp_path / "gpt"), "--sequence-parallel-size", "2"], "GPT2LMHeadModel"),
        ([str(tmp_path), "--sequence-parallel-size", "2", "--enable-lora"], "LoRA"),
        ([str(tmp_path), "--enable-shift-parallel"], "--ulysses-sequence-parallel-size"),
    ):
        done = subprocess.run(
            [sys.executable, *serve, *arguments],
            cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        ours = [line for line in done.stderr.splitlines() if line.startswith("omni-sp: error:")]
        assert len(ours) == 1
        assert told in ours[0]
