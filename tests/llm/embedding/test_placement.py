"""Which devices, memory and threads each replica gets."""

from __future__ import annotations

import pytest

from omni_sp import ConfigError
from omni_sp.cli.embedding_options import EMBEDDING, SERVE_EMBEDDINGS
from omni_sp.llm.embedding.placement import Placement, command, placements, visible_gpus
from omni_sp.llm.embedding.settings import EmbeddingSettings

_GIB = 2**30


def placed(gpus: list[str], *, replicas: int, words: str = "", count: int | None = None) -> list[Placement]:
    settings = EmbeddingSettings(model="m", replicas=replicas, gpus=count, vllm_arguments=tuple(words.split()))
    return placements(settings, gpus, {}, 16 * _GIB)


def value(placement: Placement, flag: str) -> str | None:
    words = placement.arguments
    return words[words.index(flag) + 1] if flag in words else None


def test_replicas_that_share_a_gpu_share_its_memory() -> None:
    found = placed(["0", "1"], replicas=5)
    assert [one.environment["CUDA_VISIBLE_DEVICES"] for one in found] == ["0", "1", "0", "1", "0"]
    assert [value(one, "--gpu-memory-utilization") for one in found] == ["0.3", "0.45", "0.3", "0.45", "0.3"]
    assert value(placed(["GPU-a", "GPU-b"], replicas=2)[1], "--gpu-memory-utilization") is None  # vLLM's own default
    assert (
        value(placed(["0"], replicas=2, words="--gpu-memory-utilization 0.2")[0], "--gpu-memory-utilization") == "0.2"
    )


def test_tensor_parallel_replicas_have_neighbouring_gpus() -> None:
    found = placed(list("0123"), replicas=3, words="--max-model-len 64 -tp 2")
    assert [one.devices for one in found] == [("0", "1"), ("2", "3"), ("0", "1")]
    with pytest.raises(ConfigError, match="3 GPUs cannot be shared by replicas of 2 each"):
        placed(list("0123"), replicas=2, count=3, words="-tp=2")


def test_on_a_cpu_cores_are_shared() -> None:
    found = placed([], replicas=2)
    assert found[0].environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert found[0].environment["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert placed([], replicas=1)[0].environment == {}
    assert placed(["0"], replicas=2, count=0)[0].devices == ()


def test_the_command() -> None:
    settings = EmbeddingSettings(model="m", vllm_arguments=("--dtype", "float32", "--renderer-num-workers=3"))
    (first, _) = placements(settings, [], {}, _GIB)
    words = command(settings, first, "/x/0.sock")[2:]
    assert words[:7] == ["vllm.entrypoints.cli.main", "serve", "m", "--runner", "pooling", "--uds", "/x/0.sock"]
    assert words[7:] == ["--dtype", "float32", "--renderer-num-workers=3", "--disable-uvicorn-access-log"]


def test_visible_gpus() -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3, GPU-x"}) == ["3", "GPU-x"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == []


def test_defaults_of_the_command_are_those_of_the_settings() -> None:
    defaults = EmbeddingSettings(model="m")
    for option in SERVE_EMBEDDINGS:
        if option.owner == EMBEDDING and option.field != "model":
            assert option.argparse.get("default") == getattr(defaults, option.field), option.flags
