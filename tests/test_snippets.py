"""What README.md and docs/ show is run as it stands there: with tiny models where they name large ones."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import omni_sp
from omni_sp import ParallelMesh
from omni_sp.testing import models
from omni_sp.testing.ranks import RankPool
from tests.preloaded import python
from tests.server.embedding.running import embedding_server
from tests.server.fakes import FakeOmni
from tests.server.serving import serving
from tests.snippets import PAGES, ROOT, Block, all_blocks, blocks_of, parsed, runnable
from tests.thorough import THOROUGH, thorough_only

# Models on the hub -> the tiny families that stand in for them. Qwen-Image-Edit's own needs torchvision.
TINY = {
    "Qwen/Qwen-Image": "qwen-image",
    "Qwen/Qwen-Image-Edit": "flux-kontext",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "wan",
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": "wan-i2v",
}
_GIVEN = ("flux", "wan-i2v", "llama")
"""Families of what programs take for granted."""
SMALL = ["--height", "48", "--width", "80", "--num-inference-steps", "2"]
SMALL_FOR = {
    "qwen-image": [],
    "flux-kontext": ["--extra", "_auto_resize=false"],
    "wan": ["--num-frames", "9"],
    "wan-i2v": ["--num-frames", "9"],
}
# Commands that do not run here: each has its options checked all the same.
NOT_RUN = {
    "make": "installs, or runs these tests",
    "pip": "installs",
    "source": "for the shell",
    "vllm": "needs vLLM",
    "python -m vllm": "needs vLLM",
    "omni-sp serve-llm": "needs vLLM",
    "python examples/offline_inference_ulysses.py": "needs vLLM",
    "omni-sp serve": "a server: test_servers_start_and_answer",
    "torchrun --nnodes": "needs several machines",
    "srun": "needs Slurm",
    "sbatch": "needs Slurm",
    "kubectl": "needs Kubernetes",
    "ray": "needs Ray",
    "omni-sp check MODEL": "names no model",
}
COMMANDS = [
    pytest.param(words, id=f"{block.where} {' '.join(words)}"[:90])
    for block in all_blocks("", "sh")
    for words in block.commands
]
PYTHON = [pytest.param(block, id=block.where) for block in all_blocks("python")]
ON_RANKS = [
    param
    for param in PYTHON
    if "ParallelMesh(" in param.values[0].code  # type: ignore[union-attr]
]


def environment(bin_folder: Path | None = None) -> dict[str, str]:
    path = os.environ["PATH"] if bin_folder is None else f"{bin_folder}:{os.environ['PATH']}"
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path}


def is_not_run(words: list[str]) -> bool:
    return any(f"{' '.join(words)} ".startswith(f"{beginning}") for beginning in NOT_RUN)


def stands_alone(block: Block) -> bool:
    """Whether it is a program: nothing is given to it, and it needs neither ranks of torchrun nor a running loop."""
    needs = ("init_process_group", "\nasync with ")
    return block.mark is None and not block.missing and not any(words in block.code for words in needs)


# Commands


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_has_the_options_that_are_shown(words: list[str]) -> None:
    parsed(words)


def test_a_wrong_option_is_found() -> None:
    for line in (
        "omni-sp serve --prot 1",
        "make demmo",
        "pip install .[nothing]",
        "python examples/text_to_image.py -x",
    ):
        with pytest.raises(AssertionError):
            parsed(line.split())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a clone to whoever types there, with pictures, and tiny models in tiny/."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("examples", "docs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "bin").mkdir()
    for name, module in (("python", ""), ("omni-sp", "-m omni_sp"), ("torchrun", "-m torch.distributed.run")):
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {python()} {module} "$@"\n')
        program.chmod(0o755)
    for name in ("photo.png", "cat.png"):
        Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(folder / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for family in {*_GIVEN, *(TINY.values() if THOROUGH else ())}:
            models.MODELS[family][1](folder / "tiny" / family)
    return folder


def with_tiny_model(words: list[str]) -> list[str]:
    """The same command with a tiny model, small sizes and the CPU, where it draws."""
    options = parsed(words)
    if options is None or not hasattr(options, "device") or not hasattr(options, "model"):
        return words
    family = TINY.get(options.model)
    words = [*words, "--device", "cpu"]
    return words if family is None else [*words, "--model", f"tiny/{family}", *SMALL, *SMALL_FOR[family]]


@thorough_only
@pytest.mark.parametrize("block", [pytest.param(block, id=block.where) for block in all_blocks("", "sh")])
def test_commands_run(block: Block, workplace: Path) -> None:
    for words in block.commands:
        if is_not_run(words):
            continue
        done = subprocess.run(
            with_tiny_model(words),
            cwd=workplace,
            env=environment(workplace / "bin"),
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
        if "$ " in block.code:
            shown = [line for line in block.code.splitlines() if not line.startswith("$ ")]
            assert without_numbers(done.stdout) == without_numbers("\n".join(shown))


def without_numbers(text: str) -> list[str]:
    """The lines, with every time as the same."""
    return [re.sub(r"\d+\.\d+", "N", line) for line in text.splitlines()]


# Python


@pytest.mark.parametrize("block", PYTHON)
def test_python_is_python(block: Block) -> None:
    assert block.statements


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES])
def test_programs_of_a_page_run(page: Path, tmp_path: Path) -> None:
    """One after the other in one process; a client's address is that of a server with what stands in for a model."""
    code = "\n".join(block.code for block in blocks_of(page) if block.language == "python" and stands_alone(block))
    if not code:
        pytest.skip("it has no program")
    stand_in = embedding_server(model="BAAI/bge-base-en-v1.5") if "embed" in code else None
    with stand_in or serving(FakeOmni(), api_keys=("KEY", "none")) as server:
        (tmp_path / "program.py").write_text(code.replace("http://127.0.0.1:8091", server.url))
        done = subprocess.run(
            [python(), "program.py"],
            cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    saved = re.findall(r'"([\w-]+\.png)"', code)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == sorted(set(saved))


class Given:
    """What programs of the documentation take for granted, by name. What can be imported is not among it."""

    def __init__(self, folder: Path, block: Block) -> None:
        self.folder, self.block = folder, block

    def __getitem__(self, name: str) -> Any:
        assert hasattr(self, name), f"{self.block.where} uses {name}, and neither imports nor makes it"
        return getattr(self, name)()

    def omni(self) -> Any:
        """Omni with a tiny model, which draws small results."""
        small: dict[str, Any] = {"height": 48, "width": 80, "num_inference_steps": 2}
        makes_videos = ".videos" in self.block.code
        omni = omni_sp.Omni(self.folder / "tiny/wan-i2v" if makes_videos else "omni-sp/shapes", device="cpu")
        if makes_videos:
            small["num_frames"] = 9

        def generate(prompt: Any, params: Any = None) -> Any:
            return omni.generate(prompt, replace(params or omni_sp.OmniDiffusionSamplingParams(), **small))

        return mock.Mock(generate=generate)

    def pipe(self) -> Any:
        """A pipeline with few tokens."""
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(self.folder / "tiny/flux")
        pipe.default_sample_size = 8
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def model(self) -> Any:
        """A language model."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder / "tiny/llama")

    def input_ids(self) -> Any:
        return torch.arange(3, 16)[None]


def run_block(block: Block, folder: Path) -> dict[str, Any]:
    """Run what is not marked, with what it takes for granted. Returns its names."""
    given = {} if block.mark is not None else {name: Given(folder, block)[name] for name in sorted(block.missing)}
    names: dict[str, Any] = {"__name__": "snippet", **given}
    waiting = eval(runnable(block, set(names)), names)
    if waiting is not None:
        asyncio.run(waiting)
    return names


def run_on_rank(mesh: ParallelMesh, block: Block, folder: Path) -> list[str]:
    """As under torchrun, where the ranks would join a group of their own."""
    with (
        warnings.catch_warnings(),
        mock.patch.object(dist, "init_process_group"),
        mock.patch.object(dist, "destroy_process_group"),
    ):
        warnings.simplefilter("ignore")
        return sorted(run_block(block, folder))


@pytest.mark.parametrize("block", ON_RANKS)
def test_programs_for_torchrun_run_on_ranks(block: Block, ranks: RankPool, workplace: Path) -> None:
    for names in ranks.run(run_on_rank, block, workplace, ulysses=2, ring=2):
        assert {"mesh"} < set(names)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=block.where, marks=thorough_only if "AsyncOmni" in block.code else ())
        for block in all_blocks("python")
        if not stands_alone(block) and "ParallelMesh(" not in block.code
    ],
)
def test_what_takes_something_for_granted_runs(block: Block, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    try:
        names = run_block(block, workplace)
    except ModuleNotFoundError as error:
        if block.why is None or f"needs {error.name}" != block.why.lower():
            raise
        pytest.skip(block.why)
    if "pictures" in names:
        assert [picture.size for picture in names["pictures"]] == [(80, 48)] * 3
    if "output" in names:
        assert np.asarray(names["output"].videos[0][0]).shape == (48, 80, 3)


def test_what_cannot_run_says_why() -> None:
    reasons = {block.where: block.why for block in all_blocks("python") if block.mark is not None}
    assert len(reasons) <= 5, reasons


# Servers


@contextmanager
def server_of(words: list[str], folder: Path) -> Iterator[str]:
    """Start the server of this command on a free port, yield its address once it is ready, and end it."""
    words = [*words, "--port", "0", "--device", "cpu"]
    program = subprocess.Popen(
        words, cwd=folder, env=environment(folder / "bin"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert program.stdout is not None
        lines: list[str] = []
        while not any(" is ready " in line for line in lines):
            lines.append(program.stdout.readline())
            assert lines[-1], "the server ended early"
        yield re.findall(r"http://[\d.]+:\d+", lines[0])[0]
        program.send_signal(signal.SIGTERM)
        _, errors = program.communicate(timeout=60)
        assert program.returncode == 0, errors
    finally:
        program.kill()
        program.communicate(timeout=60)


@thorough_only
@pytest.mark.parametrize("page", ["README.md", "docs/server.md"])
def test_servers_start_and_answer(page: str, workplace: Path, tmp_path: Path) -> None:
    blocks = blocks_of(ROOT / page)
    commands = [words for block in blocks if block.language == "" for words in block.commands]
    command = next(words for words in commands if words[:2] == ["omni-sp", "serve"])
    clients = [block for block in blocks if stands_alone(block) and "base_url" in block.code]
    assert clients
    with server_of(command, workplace) as url:
        for client in clients:
            (tmp_path / "client.py").write_text(client.code.replace("http://127.0.0.1:8091", url))
            program = [python(), "client.py"]
            done = subprocess.run(
                program, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100, check=False
            )
            assert done.returncode == 0, done.stderr
