"""The import name vllm_omni: the imports that programs use, and what vLLM's command hands over."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

IMPORTS = """
import omni_sp
from vllm_omni import Omni, OmniRequestOutput
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.entrypoints.omni import Omni as ByItsPath
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.lora.request import LoRARequest

assert Omni is ByItsPath is omni_sp.Omni
assert OmniRequestOutput is omni_sp.OmniRequestOutput
assert issubclass(DiffusionParallelConfig, omni_sp.DiffusionParallelConfig)
assert DiffusionParallelConfig(ulysses_degree=2).vae_parallel == "auto"
assert DiffusionParallelConfig(ulysses_degree=2, vae_patch_parallel_size=2).vae_parallel is True
assert DiffusionParallelConfig(cfg_parallel_size=2, ring_degree=2).world_size == 4
assert DiffusionParallelConfig(vae_patch_parallel_size=1).vae_parallel is False
assert DiffusionParallelConfig(ulysses_degree=2, use_hsdp=True).shard_weights is True
assert DiffusionParallelConfig(use_hsdp=False).shard_weights is False
for wrong in (
    {"use_hsdp": 1},
    {"use_hsdp": True, "shard_weights": True},
    {"vae_patch_parallel_size": 0},
    {"vae_patch_parallel_size": 2, "vae_parallel": True},
    {"usp": 2},
):
    try:
        DiffusionParallelConfig(**wrong)
    except omni_sp.ConfigError:
        continue
    raise AssertionError(wrong)
assert issubclass(OmniDiffusionSamplingParams, omni_sp.OmniDiffusionSamplingParams)
request = LoRARequest("style", 1, "loras/style")
assert OmniDiffusionSamplingParams(lora_request=request, lora_scale=0.5).adapters == (("style", 0.5),)
assert OmniDiffusionSamplingParams(lora_request=request, seed=1).adapters == (("style", 1.0),)
for wrong in ({"lora_scale": 2.0}, {"lora_request": request, "lora": "style"}):
    try:
        OmniDiffusionSamplingParams(**wrong)
    except omni_sp.SamplingParamsError:
        continue
    raise AssertionError(wrong)
"""

# As vLLM's command does it, once it has seen --omni among its arguments.
HANDED_OVER = """
import sys

sys.argv = ["vllm", *sys.argv[1:]]
from vllm_omni.entrypoints.cli.main import main

main()
"""


def run(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "compat"), str(ROOT)])}
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_imports_that_programs_use() -> None:
    done = run(IMPORTS)
    assert done.returncode == 0, done.stderr


def test_serve_is_ours_with_the_same_words() -> None:
    done = run(HANDED_OVER, "serve", "no such model", "--omni", "--port", "0", "--usp", "2")
    assert done.returncode == 2
    assert "unknown model 'no such model'" in done.stderr
    done = run(HANDED_OVER, "serve", "--omni", "--help")
    assert done.returncode == 0
    assert "--ulysses-degree" in done.stdout


def test_what_it_does_not_know_is_named() -> None:
    done = run(HANDED_OVER, "serve", "omni-sp/shapes", "--omni", "--gpu-memory-utilization", "0.9")
    assert done.returncode == 2
    assert "no option --gpu-memory-utilization" in done.stderr
