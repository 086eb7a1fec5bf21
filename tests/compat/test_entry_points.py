"""The import name vllm_omni: the imports that programs use, and what vLLM's command hands over."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

IMPORTS = """
import omni_sp
from vllm_omni import Omni, OmniDiffusionSamplingParams as AtTheTop, OmniRequestOutput
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.entrypoints.omni import Omni as ByItsPath
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.lora.request import LoRARequest

assert Omni is ByItsPath
assert OmniDiffusionSamplingParams is AtTheTop
assert issubclass(Omni, omni_sp.Omni)
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
    {"tensor_parallel_size": 2},
    {"text_encoder_tp_size": 2},
    {"sequence_parallel_size": 4, "ulysses_degree": 2},
    {"hsdp_shard_size": 4, "use_hsdp": True, "ulysses_degree": 2},
    {"hsdp_replicate_size": 2, "use_hsdp": True, "ulysses_degree": 2},
):
    try:
        DiffusionParallelConfig(**wrong)
    except omni_sp.ConfigError:
        continue
    raise AssertionError(wrong)
hsdp = {"use_hsdp": True, "hsdp_shard_size": 2, "hsdp_replicate_size": 2, "sequence_parallel_size": 2}
theirs = {"tensor_parallel_size": 1, "vae_parallel_mode": "tile", "ulysses_mode": "advanced_uaa", **hsdp}
degrees = DiffusionParallelConfig(ulysses_degree=2, cfg_parallel_size=2, **theirs)
assert (degrees.world_size, degrees.shard_weights) == (4, True)
assert issubclass(OmniDiffusionSamplingParams, omni_sp.OmniDiffusionSamplingParams)
request = LoRARequest("style", 1, "loras/style")
assert OmniDiffusionSamplingParams(lora_request=request, lora_scale=0.5).adapters == (("style", 0.5),)
assert OmniDiffusionSamplingParams(lora_request=request, seed=1).adapters == (("style", 1.0),)
dotted = LoRARequest("my.style", 1, "loras/my.style.safetensors")
assert OmniDiffusionSamplingParams(lora_request=dotted).adapters == (("my-style", 1.0),)
for wrong in ({"lora_scale": 2.0}, {"lora_request": request, "lora": "style"}):
    try:
        OmniDiffusionSamplingParams(**wrong)
    except omni_sp.SamplingParamsError:
        continue
    raise AssertionError(wrong)
"""

OPTIONS = """
from vllm_omni.diffusion.data import DEGREES
from vllm_omni.options import as_options

given = {
    "dtype": "float32", "lora_path": "x/my.style.safetensors", "lora_backend": "peft", "enable_cpu_offload": True,
    "enable_layerwise_offload": False, "vae_use_tiling": False, "cache_backend": None, "enforce_eager": True,
    "init_timeout": 600, "stage_init_timeout": 300, "cfg_parallel_size": 2, "use_hsdp": False, "not_known": 1,
    "log_stats": False, "mode": "text-to-image", "trust_remote_code": False, "quantization": "int8",
}
ours, degrees = as_options(given, DEGREES)
assert ours == {
    "dtype": "float32", "lora": {"my-style": "x/my.style.safetensors"}, "offload": "model", "startup_timeout_s": 600,
    "not_known": 1, "quantization": "int8",
}, ours
assert degrees == {"cfg_parallel_size": 2, "use_hsdp": False}, degrees
assert as_options({"lora_path": ["a", "b.st"]}, DEGREES)[0]["lora"] == {"a": "a", "b": "b.st"}
"""

REFUSED = """
import omni_sp
from omni_sp import ConfigError
from vllm_omni import Omni
from vllm_omni.diffusion.data import DiffusionParallelConfig

for option, value in {
    "lora_backend": "distill", "lora_scale": 0.5, "vae_use_tiling": True, "cache_backend": "tea_cache",
    "enable_distributed_layerwise_offload": True, "tensor_parallel_size": 2, "hsdp_shard_size": 3, "log_stats": True,
    "quantization_config": {"method": "fp8"}, "text_encoder_tp_size": 2, "not_known": 1, "max_cpu_loras": 4,
}.items():
    try:
        Omni("omni-sp/shapes", **{option: value})
    except ConfigError as error:
        assert option in str(error), error
    else:
        raise AssertionError(option)
for wrong in (
    {"enable_cpu_offload": True, "offload": "group"},
    {"enable_cpu_offload": True, "enable_layerwise_offload": True},
    {"lora_path": "a", "lora": {"a": "a"}},
    {"ulysses_degree": 2, "parallel_config": DiffusionParallelConfig()},
    {"enforce_eager": True, "compile": True},
):
    try:
        Omni("omni-sp/shapes", **wrong)
    except ConfigError as error:
        assert "give one of them" in str(error) or "parallel_config" in str(error), error
    else:
        raise AssertionError(wrong)
seen = []
omni_sp.Omni.__init__ = lambda self, *given, **options: seen.append((given, options))
Omni("m", device="cpu", ulysses_degree=2, vae_patch_parallel_size=2, vae_use_slicing=False, lora_path="a/b.st")
config = DiffusionParallelConfig(ulysses_degree=2, vae_parallel=True)
assert seen == [(("m", config), {"device": "cpu", "lora": {"b": "a/b.st"}})], seen
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


def test_keyword_arguments_of_omni_are_honoured_or_refused_by_name() -> None:
    done = run(OPTIONS + REFUSED)
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
