"""The words of vLLM's command, as those of ours: honoured, or refused by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omni_sp.cli.options import SERVE
from omni_sp.errors import ConfigError

COMPAT = Path(__file__).resolve().parents[2] / "compat"


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, from a distribution that need not be installed."""
    monkeypatch.syspath_prepend(COMPAT)
    return importlib.import_module("vllm_omni.entrypoints.cli.translate")


@pytest.fixture
def translated(words: Any) -> Callable[..., str]:
    def of(line: str, **environment: str) -> str:
        return " ".join(words.as_omni_sp(line.split(), environment))

    return of


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("serve M --omni --usp 2 --ring=2 --host 0.0.0.0", "serve M --usp 2 --ring=2 --host 0.0.0.0"),
        ("serve M --omni --api_key a b --port 1", "serve M --api-key=a --api-key=b --port 1"),
        ("serve --omni --api-key a --port 1 M", "serve --api-key=a --port 1 M"),
        ("serve M --served-model-name one two --omni", "serve M --served-model-name=one --served-model-name=two"),
        ("serve --omni --served-model-name a b --model M", "serve --served-model-name=a --served-model-name=b M"),
        ("serve --model=M --omni", "serve M"),
        ("serve M --omni --dtype half", "serve M --dtype=float16"),
        ("serve M --omni --dtype=bfloat16", "serve M --dtype=bfloat16"),
        ('serve M --omni --allowed-origins ["http://a","http://b"]', "serve M --allow-origin=http://a --allow-origin=http://b"),
        ("serve M --omni --vae-patch-parallel-size 2", "serve M --vae-parallel=on"),
        ("serve M --omni --vae_patch_parallel_size=1", "serve M --vae-parallel=off"),
        ("serve M --omni --use-hsdp --usp 2", "serve M --shard-weights --usp 2"),
        ("serve M --omni --enable-cpu-offload", "serve M --offload=model"),
        ("serve M --omni --enable_layerwise_offload", "serve M --offload=group"),
        ("serve M --omni --quantization fp8", "serve M --quantization fp8"),
        ("serve M --omni --data_parallel_size 2 --usp 2", "serve M --data-parallel-size 2 --usp 2"),
        ("serve M --omni --enable-lora --lora-modules a=p b=q", "serve M --lora=a=p --lora=b=q"),
        ('serve M --omni --lora-modules {"name":"a","path":"p"}', "serve M --lora=a=p"),
        ("serve M --omni --lora-path x/my.style.st --usp 2", "serve M --lora=my-style=x/my.style.st --usp 2"),
        ("serve --omni --help=all", "serve --help"),
        ("generate --omni --prompt x --seed 7", "generate --prompt x --seed 7"),
        ("serve M --omni --not-known 1", "serve M --not-known 1"),
    ],
)  # fmt: skip
def test_what_is_honoured(theirs: str, ours: str, translated: Callable[..., str]) -> None:
    assert translated(theirs) == ours


def test_a_server_that_an_environment_variable_locks_stays_locked(translated: Callable[..., str]) -> None:
    assert translated("serve M --omni", VLLM_API_KEY="secret") == "serve M --api-key=secret"
    assert translated("serve M --omni --api-key mine", VLLM_API_KEY="secret") == "serve M --api-key=mine"
    assert translated("serve M --omni --api-key-file F", VLLM_API_KEY="secret") == "serve M --api-key-file F"
    assert translated("serve M --omni", VLLM_API_KEY="") == "serve M"
    assert translated("check M --omni", VLLM_API_KEY="secret") == "check M"


@pytest.mark.parametrize(
    ("line", "way_out"),
    [
        ("serve M --omni --uvicorn-log-level info", "leave it out"),
        ("serve M --omni --gpu-memory-utilization=0.9", "text engine"),
        ("serve M --omni --tensor_parallel_size 2", "--usp and --ring"),
        ("serve M --omni -tp 2", "--usp and --ring"),
        ("serve M --omni --no-enable-prefix-caching", "text engine"),
        ("serve M --omni --seed 7", "every request has its own seed"),
        ("serve M --omni --ssl-ca-certs F", "a proxy in front"),
        ("serve M --omni --allowed-origins http://a", "a JSON list"),
        ("serve M --omni --allowed-origins [1]", "a JSON list"),
        ("serve M --omni --vae-patch-parallel-size all", "a whole number"),
        ("serve M --omni --vae-use-tiling", "--vae-parallel on"),
        ("serve M --omni --vae-parallel-mode tile", "--vae-parallel on"),
        ("serve M --omni --text-encoder-tp-size 2", "one rank"),
        ("serve M --omni --model", "needs a value"),
        ("serve --omni --api-key K M", "name the model first"),
        ("serve M --omni --lora-backend distill", "requests name them"),
        ('serve M --omni --lora-modules {"name":"a"}', "NAME=PATH, or a JSON object"),
    ],
)
def test_what_is_refused_is_named_with_the_way_out(line: str, way_out: str, translated: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match=way_out) as refused:
        translated(line)
    option = next(word for word in line.split() if word.startswith("-") and word != "--omni")
    assert option.partition("=")[0].replace("_", "-") in str(refused.value)


def test_no_option_of_ours_is_refused(words: Any) -> None:
    assert not words.REFUSED.keys() & {flag for option in SERVE for flag in option.flags}
