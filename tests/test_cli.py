"""The command line: one line for every error, the right exit code, and pictures where they were asked for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import omni_sp.omni
from omni_sp import OmniDiffusionSamplingParams, OmniRequestOutput, RankFailedError
from omni_sp.cli import PictureFiles, main
from omni_sp.engine.messages import Ready
from omni_sp.errors import ConfigError
from omni_sp.pipelines.call import PipelineFacts
from tests.engine.processes import alive, becomes_true, children

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--width", "64", "--height", "64", "--num-inference-steps", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = children()
    yield
    assert becomes_true(lambda: children() <= before, 5.0)


def run(*words: str) -> int:
    """The exit code, whether argparse or the command gave it."""
    try:
        return main(["generate", *words])
    except SystemExit as stop:
        return int(str(stop.code))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no prompt: give at least one --prompt"),
        (["--ulysses-degree", "0"], "ulysses_degree=0: each degree is a whole number of at least 1"),
        (["--ring_degree", "-2"], "ring_degree=-2: each degree is a whole number of at least 1"),
        (["--usp", "two"], "invalid int value: 'two'"),
        (["--model", "no such model"], "unknown model 'no such model'"),
        (["--model", "."], "is no diffusers pipeline (it has no model_index.json)"),
        (["--output", "file/picture.png"], "--output file/picture.png cannot be written: Not a directory"),
        (["--output", "/proc/picture.png"], "--output /proc/picture.png cannot be written"),
        (["--output", "picture.docx"], ".docx is no picture format"),
        (["--width", "0"], "width=0: give a whole number of at least 1"),
        (["--seed", "-1"], "seed=-1: give a whole number from 0"),
        (["--cfg-scale", "nan"], "true_cfg_scale=nan: give a finite number"),
        (["--num-inference-stepps", "3"], "did you mean --num-inference-steps?"),
        (["--device", "gpu"], "device='gpu': give"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_bad_input_is_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    prompt = ["--prompt", "a red circle"] if words else []
    assert run(*prompt, *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == ["file"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["--width", "70"],
            "width=70: QwenImagePipeline needs a multiple of 8, and draws multiples of 16; nearest: 64 or 80",
        ),
        (["--guidance-scale", "3"], "QwenImagePipeline would ignore guidance_scale=3.0"),
        (["--attention-backend", "nothing"], "no attention kernel is called 'nothing'"),
        (["--attention-strategy", "nothing"], "no attention strategy is called 'nothing'"),
    ],
)
def test_what_the_pipeline_refuses_is_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--prompt", "a red circle", "--device", "cpu", *words) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert run("--prompt", "a red circle", "--usp", "2", "--ring", "2") == 2
    assert "4 ranks need 4 GPUs, one each, and this machine has 1" in capsys.readouterr().err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--prompt", "a red circle", "--ring-degree", "0", "--debug") == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("omni-sp: error: ring_degree=0")


def test_draws_into_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--prompt", "a red circle", "--seed", "3", "--cfg_scale=2", *SMALL, "--output", "new/circle.png") == 0
    with Image.open("new/circle.png") as picture:
        assert picture.size == (64, 64)
    out = capsys.readouterr().out
    assert "1 rank, nothing is split" in out
    assert "2 steps of" in out
    assert "seed 3" in out
    assert out.splitlines()[-1] == f"picture {Path('new/circle.png')}"


def test_numbers_several_pictures() -> None:
    prompts = ["--prompt", "a red circle", "--prompt", "a star"]
    assert run(*prompts, "--num-images-per-prompt", "2", *SMALL, "--output", "many.png") == 0
    assert sorted(path.name for path in Path().iterdir()) == [f"many-{number}.png" for number in range(1, 5)]


def test_a_folder_keeps_what_it_has(tmp_path: Path) -> None:
    for _ in range(2):
        files = PictureFiles("pictures", num_pictures=1)
        files.save(Image.new("RGB", (1, 1)))
    assert sorted(path.name for path in Path("pictures").iterdir()) == ["picture-0001.png", "picture-0002.png"]


def test_asking_where_pictures_could_go_creates_nothing() -> None:
    PictureFiles("a/b/c.png", num_pictures=1)
    PictureFiles("pictures/", num_pictures=3)
    with pytest.raises(ConfigError):
        PictureFiles("picture.nothing", num_pictures=1)
    assert list(Path().iterdir()) == []


class FakeOmni:
    """Draws one picture, then fails; knows what it was asked."""

    asked: OmniDiffusionSamplingParams | None = None
    facts = PipelineFacts(name="FakePipeline", parameters={"prompt": None, "guidance_scale": 5.0})
    speaks = True

    def __init__(self, *_: Any, **__: Any) -> None:
        self.info = Ready(rank=0, ranks=1, layout="", facts=self.facts, device="cpu", dtype="float32", load_s=0.0)

    def __enter__(self) -> FakeOmni:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def generate_each(self, prompts: list[str], params: OmniDiffusionSamplingParams) -> Iterator[OmniRequestOutput]:
        type(self).asked = params
        metrics = {"total_s": 1, "text_encoder_s": 1, "vae_s": 1, "denoise_step_s": 1, "num_steps": 1, "tokens": {}}
        image = Image.new("RGB", (1, 1))
        yield OmniRequestOutput("request-0", prompts[0], images=[image], metrics=metrics | {"seed": 1})
        raise RankFailedError("rank 1 of 2 raised RuntimeError: first line\nsecond line", rank=1)


def test_pictures_already_finished_are_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(omni_sp.omni, "Omni", FakeOmni)
    assert run("--prompt", "a", "--prompt", "b", "--output", "kept.png") == 1
    assert Path("kept-1.png").exists()
    err = capsys.readouterr().err
    assert err == (
        "omni-sp: error: rank 1 of 2 raised RuntimeError: first line second line "
        "(finished before and kept: kept-1.png)\n"
    )


def test_cfg_scale_is_guidance_scale_where_there_is_no_true_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(omni_sp.omni, "Omni", FakeOmni)
    run("--prompt", "a", "--cfg-scale", "3")
    assert FakeOmni.asked == OmniDiffusionSamplingParams(guidance_scale=3.0)
    capsys.readouterr()
    assert run("--prompt", "a", "--cfg-scale", "3", "--guidance-scale", "4") == 2
    assert "mean the same" in capsys.readouterr().err


def test_videos_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(omni_sp.omni, "Omni", FakeOmni)
    monkeypatch.setattr(FakeOmni, "facts", PipelineFacts(name="Film", parameters={}, makes_videos=True))
    assert run("--prompt", "a") == 2
    assert "Film makes videos" in capsys.readouterr().err


def test_ctrl_c_in_the_middle_keeps_what_is_finished_and_leaves_no_process() -> None:
    words = [str(ROOT / "examples" / "text_to_image.py"), "--output", "pictures", "--device", "cpu", "--usp", "2"]
    words += ["--prompt", "a red circle", "--prompt", "a star", "--num_inference_steps", "30"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-u", *words, "--width", "16", "--height", "16"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None
        while not (line := program.stdout.readline()).startswith("picture "):
            assert line, "the program ended early"
        ranks = children(program.pid)
        program.send_signal(signal.SIGINT)
        _, err = program.communicate(timeout=30)
    assert program.returncode == 130
    picture = Path("pictures/picture-0001.png")
    assert err == f"omni-sp: stopped by Ctrl-C (finished before and kept: {picture})\n"
    with Image.open(picture) as image:
        assert image.size == (16, 16)
    assert len(ranks) == 2
    assert not any(alive(rank) for rank in ranks)
