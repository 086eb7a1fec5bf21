"""The example program, run as a user runs it, on a tiny model that was saved to a folder."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.llm.hf import tiny
from tests.preloaded import python
from tests.thorough import thorough_only

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("torchrun", [False, pytest.param(True, marks=thorough_only)])
def test_the_long_prompt_example_prints_times_and_the_same_answer(tmp_path: Path, torchrun: bool) -> None:
    tiny.model("qwen3, norms").save_pretrained(tmp_path)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if torchrun else []
    words = ["--model", tmp_path, "--tokens", 200, "--max-new-tokens", 5, "--prefill-chunk", 64, "--device", "cpu"]
    done = subprocess.run(
        [python(), *launcher, str(ROOT / "examples" / "long_prompt.py"), *map(str, words), "--ring-degree", "2"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["model"] == "Qwen3ForCausalLM, float32 on cpu"
    assert lines["prompt"] == "200 tokens"
    assert lines["1"].startswith("rank  first token after ")
    # 102 of 204 tokens, keys and values, 2 layers, 3 heads of 16, 4 bytes.
    assert lines["2"].endswith("s; keys and values 0.1 MB a rank")
    assert len(lines["answer"].split()) == 5
    assert lines["equal"] == "True"
