"""Inside vLLM: the same tokens as transformers, whichever way a step runs, through every entry point."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from omni_sp.testing.components import VOCABULARY_SIZE
from omni_sp.testing.models import save_language_model
from omni_sp.testing.watcher import Watcher
from tests.engine.processes import becomes_true
from tests.preloaded import python
from tests.thorough import thorough_only

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here: make test-vllm", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[3]
PATIENCE_S = 280.0
COUNT = 12
LENGTHS = 1, 7, 13, 34, 161  # of which the last ones pass in chunks of 64
VERSION = os.environ.get("OMNI_SP_VLLM")  # the one to test; None for the installed one
SPECULATES = VERSION != "0.30.0"  # n-gram speculation of 0.30.0 fails on a CPU without Triton, in one process too
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
SMALL = {"dtype": "float32", "max_model_len": 256, "max_num_batched_tokens": 64, "max_num_seqs": 8}
FLAGS = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def finished(arguments: Sequence[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program for PATIENCE_S at most. Nothing of it is left: vLLM's processes would outlive their parent."""
    process = subprocess.Popen(
        arguments,
        cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    with process, contextlib.closing(Watcher(process, signal.SIGKILL, is_group=True)):
        try:
            out, err = process.communicate(timeout=PATIENCE_S)
        finally:
            kill_group(process)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def kill_group(process: subprocess.Popen[str]) -> None:
    """End a program and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program of Python, which must succeed."""
    done = finished([python(), *arguments], folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def engine(
    folder: Path,
    batches: list[list[list[int]]],
    *,
    count: int = COUNT,
    aborts: bool = False,
    more: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What an engine answers to these prompts, and what it counted; ``aborts``: also abort a request after each.

    ``more``: further entries of the case, for what else run_vllm can do.
    """
    case = {
        "options": {"model": str(folder), **SMALL, **options}, "batches": batches, "count": count, "aborts": aborts
    }  # fmt: skip
    case |= more or {}
    (folder / "case.json").write_text(json.dumps(case))
    run(["-m", "tests.llm.vllm.run_vllm", "case.json", "result.json"], folder)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def prompts(*lengths: int) -> list[list[int]]:
    """Random token ids, without the special ones."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, VOCABULARY_SIZE, (length,), generator=generator).tolist() for length in lengths]


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The token ids that transformers generates."""
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    generated: list[int] = ids[0, len(prompt) :].tolist()
    return generated


@pytest.mark.parametrize(
    ("kind", "kv_heads", "tensor", "sequence"),
    [
        ("qwen3", 1, 1, 2),  # one head for two ranks
        *(
            pytest.param(*case, marks=thorough_only)
            for case in (
                ("llama", 2, 1, 2),
                ("mistral", 4, 1, 2),
                ("qwen2", 1, 1, 2),
                ("llama", 1, 2, 2),
                ("mistral", 4, 2, 2),
                ("qwen2", 2, 2, 2),
                ("qwen3", 2, 2, 2),
                ("llama", 2, 1, 4),
            )
        ),
    ],
)
def test_greedy_tokens_equal_transformers_in_both_modes_and_with_a_cached_prefix(
    tmp_path: Path, kind: str, kv_heads: int, tensor: int, sequence: int
) -> None:
    """A request begins by Ulysses and goes on by tensor parallelism; then the same where a threshold is measured."""
    model = save_language_model(kind, tmp_path, num_key_value_heads=kv_heads)
    first = prompts(*LENGTHS)
    again = [first[4] + [5, 6, 7], [*first[4][:100], 9, 9]]
    result = engine(
        tmp_path,
        [first, again],
        tensor_parallel_size=tensor,
        ulysses_sequence_parallel_size=sequence,
        enable_shift_parallel=True,
        shift_parallel_threshold=20,
        enable_prefix_caching=True,
    )
    assert VERSION in (None, result["version"])
    assert result["tokens"] == [[greedy(model, prompt, COUNT) for prompt in batch] for batch in (first, again)]
    ulysses_steps, ulysses_tokens, tensor_steps, _, models, threshold = result["steps"][:6]
    assert ulysses_steps
    assert tensor_steps
    assert models == 1
    assert threshold == 20
    computed = sum(map(len, first)) + sum(map(len, again))
    assert ulysses_tokens < computed, "no prefix was taken from the cache"
    # The threshold is measured while these prompts are in the cache, which measuring neither reads nor writes.
    assert result["tokens_again"] == result["tokens"][1]
    assert result["measured"] >= 0
    config = model.config
    hidden, inner = config.hidden_size, config.intermediate_size
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    heads = config.num_attention_heads + max(kv_heads, tensor)  # a kv head that two inner ranks need is on both
    layer = 2 * hidden * head_dim * heads + 3 * hidden * inner
    for rank in result["memory"]:
        # Both kinds of steps use these matrices, so shift parallelism needs no others.
        assert rank["matrices"] == config.num_hidden_layers * layer * 4 // tensor
        # Fewer kv heads than ranks: one each, as vLLM's own tensor parallelism keeps it.
        heads_per_rank = max(1, kv_heads // (tensor * sequence))
        assert rank["kept_per_token"] == config.num_hidden_layers * 2 * heads_per_rank * head_dim * 4


@pytest.mark.parametrize(
    ("kind", "tensor", "sequence", "backend"),
    [
        ("llama", 1, 2, "eager"),  # the graph as it was traced, without generating code
        *(
            pytest.param(*case, marks=thorough_only)
            for case in (
                ("qwen3", 1, 2, "inductor"),
                ("qwen2", 2, 2, "inductor"),
                ("mistral", 1, 2, "inductor"),
                ("llama", 1, 4, "eager"),
            )
        ),
    ],
)
def test_a_compiled_decoder_gives_the_tokens_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, tensor: int, sequence: int, backend: str
) -> None:
    """The first step, of one token, is the one that is traced with "eager"; steps of other lengths follow."""
    if backend == "eager":
        monkeypatch.setitem(ENVIRONMENT, "VLLM_CPU_CI_ENV", "1")
    monkeypatch.setitem(ENVIRONMENT, "VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    model = save_language_model(kind, tmp_path)
    first = prompts(*LENGTHS)
    again = [first[4] + [5, 6, 7], [*first[4][:100], 9, 9]]
    batches = [first[:1], first, again, *([prompt] for prompt in first)]
    result = engine(
        tmp_path,
        batches,
        tensor_parallel_size=tensor,
        ulysses_sequence_parallel_size=sequence,
        enable_prefix_caching=True,
        enforce_eager=False,
    )
    assert result["tokens"] == [[greedy(model, prompt, COUNT) for prompt in batch] for batch in batches]
    assert result["steps"][0]
    assert result["compiled"]


@pytest.mark.skipif(not SPECULATES, reason="this version's verification of drafts needs Triton")
@pytest.mark.parametrize("sequence", [1, 2])
def test_suffix_decoding_gives_the_tokens_of_transformers_in_fewer_steps(tmp_path: Path, sequence: int) -> None:
    """With chunks, the shift, a cached prefix, and a request that is aborted after each batch."""
    model = save_language_model("qwen2", tmp_path)
    first = [*prompts(*LENGTHS), prompts(9)[0] * 6]
    again = [first[4] + [5, 6, 7], [*first[4][:100], 9, 9]]
    shift: dict[str, Any] = {"enable_shift_parallel": True, "shift_parallel_threshold": 20} if sequence > 1 else {}
    result = engine(
        tmp_path,
        [first, again, first],
        count=48,
        aborts=True,
        ulysses_sequence_parallel_size=sequence,
        enable_prefix_caching=True,
        enforce_eager=True,
        speculative_config={"method": "suffix", "num_speculative_tokens": 24},
        **shift,
    )
    assert result["tokens"] == [[greedy(model, prompt, 48) for prompt in batch] for batch in (first, again, first)]
    ulysses_steps, _, tensor_steps, _, models, _, drafts, draft_tokens, accepted = result["steps"][:9]
    assert bool(ulysses_steps) == bool(tensor_steps) == bool(models) == (sequence > 1)
    assert 0 < drafts < accepted < draft_tokens
    # The same prompts once more: nearly all comes from drafts. Some of it is the work of the aborted request.
    before, after = (steps[8] for steps in result["steps_after"][1:])
    assert after - before >= 0.8 * 48 * len(first), result["steps_after"]


@pytest.mark.skipif(SPECULATES, reason="this version verifies drafts on this CPU")
def test_drafts_that_this_vllm_cannot_verify_are_refused_by_its_version(tmp_path: Path) -> None:
    save_language_model("qwen2", tmp_path)
    options = {"model": str(tmp_path), **SMALL, "speculative_config": {"method": "suffix"}}
    (tmp_path / "case.json").write_text(json.dumps({"options": options, "batches": [], "aborts": False, "count": 1}))
    done = finished([sys.executable, "-m", "tests.llm.vllm.run_vllm", "case.json", "result.json"], tmp_path)
    assert done.returncode
    assert f"vLLM {VERSION} cannot verify drafts on this CPU" in done.stdout + done.stderr


@thorough_only
@pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM keeps keys and values in fp8 on CPUs with AVX-512 alone"
)
def test_keys_and_values_in_fp8_give_the_tokens_of_vllm_itself(tmp_path: Path) -> None:
    save_language_model("llama", tmp_path)
    batch = prompts(*LENGTHS)
    shared: dict[str, Any] = {"kv_cache_dtype": "fp8", "enforce_eager": True}
    alone = engine(tmp_path, [batch, batch], **shared)
    result = engine(
        tmp_path,
        [batch, batch],
        ulysses_sequence_parallel_size=2,
        enable_shift_parallel=True,
        shift_parallel_threshold=20,
        **shared,
    )
    assert result["tokens"] == alone["tokens"]


@thorough_only
def test_without_our_flags_vllms_models_are_unchanged(tmp_path: Path) -> None:
    """One process, as vLLM's users run it; classes for embeddings are derived as vLLM does it."""
    model = save_language_model("llama", tmp_path)
    batch = prompts(7, 34)
    result = engine(tmp_path, [batch], enforce_eager=True)
    assert VERSION in (None, result["version"])
    assert result["tokens"] == [[greedy(model, prompt, COUNT) for prompt in batch]]
    assert result["steps"] is None


@contextlib.contextmanager
def server(folder: Path, arguments: list[str], flags: Sequence[str] = FLAGS) -> Iterator[str]:
    """Start a server and yield its address; afterwards no process of it is left."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = (folder / "log").open("w")
    command = [*arguments, *flags, "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    watcher = Watcher(process, signal.SIGKILL, is_group=True)
    processes: list[psutil.Process] = []
    try:
        until = time.monotonic() + PATIENCE_S
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, (folder / "log").read_text()[-4000:]
            assert time.monotonic() < until, (folder / "log").read_text()[-4000:]
            time.sleep(0.5)
        processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        log.close()
        gone = becomes_true(lambda: not any(map(_runs, processes)), 20.0)
        kill_group(process)
        watcher.close()
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
        chunks = client.chat.completions.create(
            model=str(model), messages=[{"role": "user", "content": words}], max_tokens=8, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def expected(model: Any, folder: Path, words: str) -> str:
    """The same answer by transformers."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": words}], tokenize=True, return_dict=True)[
        "input_ids"
    ]
    tokens = greedy(model, list(ids), 8)
    if tokenizer.eos_token_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def completed(url: str, model: Path, batch: list[list[int]]) -> list[list[int]]:
    """The token ids that the server generates after each prompt; all prompts are sent at once."""
    body = {"model": str(model), "prompt": batch, "max_tokens": COUNT, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body | {"return_token_ids": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        choices = json.load(answer)["choices"]
    return [choice["token_ids"] for choice in sorted(choices, key=lambda choice: int(choice["index"]))]


def metrics(url: str) -> dict[str, float]:
    """Our entries of /metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line.startswith("omni_sp"))}


ULYSSES, TENSOR = (f'omni_sp_llm_steps_total{{mode="{mode}"}}' for mode in ("ulysses", "tensor"))
THRESHOLD = "omni_sp_llm_shift_threshold_tokens"


def version(url: str) -> str:
    """The vLLM that answers."""
    with urllib.request.urlopen(f"{url}/version", timeout=10) as answer:
        return str(json.load(answer)["version"])


WORDS = "a red circle on a blue cat in the snow walks on the star"


@pytest.mark.parametrize("shift", ["", pytest.param("--enable-shift-parallel", marks=thorough_only)])
def test_vllm_serve_with_our_flags_answers_a_chat(tmp_path: Path, shift: str) -> None:
    """By Ulysses alone, answers included; or with a threshold that it measures as it starts."""
    model = save_language_model("llama", tmp_path)
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(tmp_path)]
    flags = f"--ulysses-sequence-parallel-size 2 {shift}"
    speculation = ["--speculative-config", '{"method": "suffix"}'] if SPECULATES else []
    with server(tmp_path, [*command, *flags.split(), *speculation]) as url:
        assert VERSION in (None, version(url))
        batch = prompts(*LENGTHS)
        assert completed(url, tmp_path, batch) == [greedy(model, one, COUNT) for one in batch]
        assert chat(url, tmp_path, WORDS).strip() == expected(model, tmp_path, WORDS).strip()
        counts = metrics(url)
        assert bool(counts['omni_sp_llm_drafts_total{by="suffix"}']) == SPECULATES
        if shift:
            assert counts[THRESHOLD] >= 0
            assert counts[ULYSSES] + counts[TENSOR]
        else:
            assert counts[THRESHOLD] == -1
            assert counts[ULYSSES]
            assert not counts[TENSOR]


def test_the_api_server_at_two_by_two_generates_the_tokens_of_transformers(tmp_path: Path) -> None:
    """Qwen2 with biases, tensor × sequence parallel 2 × 2 and the shift between them, n-gram speculation beside it."""
    model = save_language_model("qwen2", tmp_path)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path)]
    flags = "--tensor-parallel-size 2 --sequence-parallel-size 2 --enable-shift-parallel --shift-parallel-threshold 20"
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    speculation = ["--speculative-config", json.dumps(ngram)] if SPECULATES else []
    with server(tmp_path, [*command, *flags.split(), *speculation]) as url:
        assert VERSION in (None, version(url))
        batch = prompts(*LENGTHS)
        assert completed(url, tmp_path, batch) == [greedy(model, one, COUNT) for one in batch]
        assert chat(url, tmp_path, WORDS).strip() == expected(model, tmp_path, WORDS).strip()
        counts = metrics(url)
        assert counts[ULYSSES]
        assert counts[TENSOR]
        assert counts[THRESHOLD] == 20


@pytest.mark.parametrize("through_vllm", [False, pytest.param(True, marks=thorough_only)])
def test_an_unsupported_model_is_one_line_before_anything_starts(tmp_path: Path, through_vllm: bool) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}')
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"] if through_vllm else [
        str(Path(sys.executable).with_name("omni-sp")), "serve-llm"
    ]  # fmt: skip
    done = finished([*command, str(tmp_path), "--sequence-parallel-size", "2"], tmp_path)
    assert done.returncode == 2
    ours = [line for line in done.stderr.splitlines() if line.startswith("omni-sp: error:")]
    assert len(ours) == 1
    assert "GPT2LMHeadModel" in ours[0]
