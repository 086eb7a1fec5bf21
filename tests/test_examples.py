"""The example programs, run as a user runs them, on tiny pipelines that were saved to a folder."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omni_sp import Omni, OmniDiffusionSamplingParams, ParallelMesh
from omni_sp.testing import models
from omni_sp.testing.ranks import RankPool
from tests.preloaded import python
from tests.thorough import thorough_only

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "make the red circle on the green snow"
VIDEO = {"height": 48, "width": 80, "num_frames": 9, "num_inference_steps": 3, "seed": 7}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pipelines kontext, wan and wan-i2v, and a picture."""
    folder = tmp_path_factory.mktemp("saved")
    models.save_flux_kontext(folder / "kontext", num_levels=2)
    models.save_wan(folder / "wan")
    models.save_wan_i2v(folder / "wan-i2v")
    picture().save(folder / "picture.png")
    return folder


def picture(width: int = 52, height: int = 36) -> Image.Image:
    """Colours that run across, with an edge in them."""
    rows, columns = np.mgrid[0:height, 0:width]
    red = np.where(columns > width // 3, 220, 30)
    pixels = np.stack([red, rows * 255 // height, columns * 255 // width], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def pixels(frames: list[Image.Image]) -> Any:
    return np.stack([np.asarray(frame, dtype=np.int16) for frame in frames])


def run(example: str, *words: Any, cwd: Path, code: int = 0) -> str:
    """What an example prints: on stdout, or on stderr where it is to fail."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [python(), str(ROOT / "examples" / f"{example}.py"), "--device", "cpu", *map(str, words)]
    done = subprocess.run(program, cwd=cwd, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def options(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def read_video(path: Path) -> tuple[float, Any]:
    """Frames a second, and the frames."""
    import av

    with av.open(path) as film:
        (stream,) = film.streams.video
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in film.decode(stream)])
        return float(stream.average_rate or 0), frames.astype(np.int16)


def one_process(model: Path, prompt: Any, **values: Any) -> Any:
    with Omni(model, device="cpu") as omni:
        return omni.generate(prompt, OmniDiffusionSamplingParams(**values))[0]


def shared_frames(mesh: ParallelMesh, model: Path, prompt: Any, values: dict[str, Any]) -> Any:
    """The frames that the ranks of a running program draw together."""

    with Omni(model, mesh.config, device="cpu") as omni:
        return pixels(omni.generate(prompt, OmniDiffusionSamplingParams(**values))[0].videos[0])


def test_a_picture_is_edited_as_on_one_process(saved: Path, tmp_path: Path) -> None:
    asked = {"height": 44, "width": 60, "num_inference_steps": 3, "seed": 7, "max_sequence_length": 13}
    words = ["--model", saved / "kontext", "--image", saved / "picture.png", "--prompt", PROMPT, *options(asked)]
    words += ["--extra", "_auto_resize=false", "--ulysses-degree", 2, "--ring-degree", 2]
    shown = run("image_edit", *words, cwd=tmp_path)
    assert "FluxKontextPipeline, float32 on cpu" in shown
    assert "= 4 ranks" in shown
    assert shown.splitlines()[-1] == "picture pictures/picture-0001.png"
    extra = {"_auto_resize": False}
    alone = one_process(saved / "kontext", {"prompt": PROMPT, "image": picture()}, **asked, extra_args=extra)
    other = one_process(saved / "kontext", {"prompt": PROMPT, "image": picture(36, 52)}, **asked, extra_args=extra)
    with Image.open(tmp_path / "pictures/picture-0001.png") as file:
        edited = pixels([file])
    assert edited.shape == (1, 44, 60, 3)
    assert np.abs(edited - pixels(alone.images)).max() <= 2
    assert edited.std() > 1
    assert np.abs(edited - pixels(other.images)).max() > 2, "the picture that is edited makes no difference"


def test_a_video_is_drawn_and_can_be_read_back(saved: Path, tmp_path: Path) -> None:
    words = ["--model", saved / "wan", "--prompt", PROMPT, *options(VIDEO), "--fps", 12]
    shown = run("text_to_video", *words, cwd=tmp_path)
    assert shown.splitlines()[-1] == "video   videos/video-0001.mp4  9 frames, 12 a second"
    fps, frames = read_video(tmp_path / "videos/video-0001.mp4")
    assert (fps, frames.shape) == (12.0, (9, 48, 80, 3))
    assert [path.name for path in (tmp_path / "videos").iterdir()] == ["video-0001.mp4"]
    drawn = one_process(saved / "wan", PROMPT, **VIDEO, fps=12)
    assert drawn.metrics["fps"] == 12
    assert np.corrcoef(frames.ravel(), pixels(drawn.videos[0]).ravel())[0, 1] > 0.8


@thorough_only
def test_a_picture_becomes_videos_over_two_ranks(saved: Path, tmp_path: Path) -> None:
    words = ["--model", saved / "wan-i2v", "--image", saved / "picture.png", "--prompt", PROMPT, *options(VIDEO)]
    words += ["--num-outputs-per-prompt", 2, "--ring", 2, "--output", "new/clip.mp4"]
    shown = run("image_to_video", *words, cwd=tmp_path)
    assert "ring_degree 2 = 2 ranks" in shown
    assert shown.splitlines()[-2:] == [f"video   new/clip-{number}.mp4  9 frames, 16 a second" for number in (1, 2)]
    for number in (1, 2):
        fps, frames = read_video(tmp_path / "new" / f"clip-{number}.mp4")
        assert (fps, frames.shape) == (16.0, (9, 48, 80, 3))


@pytest.mark.parametrize(
    ("model", "prompt"),
    [("wan", PROMPT), ("wan-i2v", {"prompt": PROMPT, "image": picture()})],
    ids=["text to video", "image to video"],
)
def test_frames_are_those_of_one_process(ranks: RankPool, saved: Path, model: str, prompt: Any) -> None:
    alone = pixels(one_process(saved / model, prompt, **VIDEO).videos[0])
    for shared in ranks.run(shared_frames, saved / model, prompt, VIDEO, ulysses=2, ring=2):
        assert shared.shape == (9, 48, 80, 3)
        assert np.abs(shared - alone).max() <= 2
    assert alone.std() > 1


@pytest.mark.parametrize("example", ["image_edit", "image_to_video"])
def test_a_missing_picture_is_reported_at_once(example: str, tmp_path: Path) -> None:
    shown = run(example, "--prompt", PROMPT, cwd=tmp_path, code=2)
    assert shown == "omni-sp: error: no picture to start from: give --image PATH\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("example", "num_processes", "printed", "pictures"),
    [
        ("api_attention", 2, ["rank 0: 8 tokens, largest difference", "rank 1: 5 tokens"], []),
        ("api_parallelize", 2, ["ulysses_degree 2", "'hidden_states': 256"], ["api_parallelize.png"]),
        pytest.param(
            "api_omni", 1, ["2 ranks", "a large green star"], ["api_omni-1.png", "api_omni-2.png"], marks=thorough_only
        ),
        pytest.param(
            "api_async", 1, ["1.png: done", "2.png: done"], ["api_async-1.png", "api_async-2.png"], marks=thorough_only
        ),
    ],
)
def test_the_api_in_a_few_lines(
    example: str, num_processes: int, printed: list[str], pictures: list[str], tmp_path: Path
) -> None:
    """Each runs by the command in its docstring, without an option."""
    path = ROOT / "examples" / f"{example}.py"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    program = [python(), *(launcher if num_processes > 1 else []), str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(words in done.stdout for words in printed), done.stdout
    assert sorted(file.name for file in tmp_path.iterdir()) == pictures
    for name in pictures:
        with Image.open(tmp_path / name) as file:
            assert pixels([file]).std() > 1
    if example == "api_attention":
        differences = [float(line.split()[-1]) for line in done.stdout.splitlines()]
        assert max(differences) <= 1e-6
    command = f"torchrun --nproc-per-node {num_processes}" if num_processes > 1 else "python"
    assert f"\n{command} examples/{example}.py\n" in path.read_text(encoding="utf-8")
