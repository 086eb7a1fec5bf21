"""The command line: one line for every error, the right exit code, and files where they were asked for."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import omni_sp.files
import omni_sp.omni
from omni_sp import ConfigError, OmniDiffusionSamplingParams, OmniRequestOutput, RankFailedError
from omni_sp.cli import main
from omni_sp.engine.messages import Ready
from omni_sp.files import OutputFiles, read_picture
from omni_sp.pipelines.arguments import Prompt
from omni_sp.pipelines.capabilities import PipelineCapabilities
from tests.engine.processes import alive, becomes_true, descendants, rank_processes

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--width", "64", "--height", "64", "--num-inference-steps", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = descendants()
    yield
    assert becomes_true(lambda: descendants() <= before, 5.0)


def run(*words: str) -> int:
    """The exit code, whether argparse or the command gave it."""
    try:
        return main(["generate", *words])
    except SystemExit as stop:
        return int(str(stop.code))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no prompt: give at least one --prompt"),
        (["--ulysses-degree", "0"], "ulysses_degree=0: each degree is a whole number of at least 1"),
        (["--ring_degree", "-2"], "ring_degree=-2: each degree is a whole number of at least 1"),
        (["--usp", "two"], "invalid int value: 'two'"),
        (["--model", "no such model"], "unknown model 'no such model'"),
        (["--model", "."], "is no diffusers pipeline (it has no model_index.json)"),
        (["--output", "file/picture.png"], "--output file/picture.png cannot be written: Not a directory"),
        (["--output", "/proc/picture.png"], "--output /proc/picture.png cannot be written"),
        (["--output", "a" * 300 + ".png"], "cannot be written: File name too long"),
        (
            ["--output", "picture.docx"],
            ".docx is no picture, video or sound format; use .png, .jpg or .webp, .mp4, or .wav",
        ),
        (["--image", "nothing.png"], "--image nothing.png cannot be read: [Errno 2]"),
        (["--image", "file"], "--image file cannot be read: cannot identify image file"),
        (["--fps", "0"], "fps=0.0: give a number above 0"),
        (["--extra", "strength"], "--extra strength: give NAME=JSON"),
        (["--extra", "mode=fast"], "'fast' is no JSON; text needs quotes of its own: --extra 'mode=\"fast\"'"),
        (["--extra", 'output_type="np"'], "files are written from finished results"),
        (["--cfg-scale", "2", "--true-cfg-scale", "3"], "two names of one thing"),
        (["--width", "0"], "width=0: give a whole number of at least 1"),
        (["--seed", "-1"], "seed=-1: give a whole number from 0"),
        (["--cfg-scale", "nan"], "true_cfg_scale=nan: give a finite number"),
        (["--num-inference-stepps", "3"], "did you mean --num-inference-steps?"),
        (["--bogus", "3"], "no option --bogus; see"),
        (["--seed", "9" * 5000], "argument --seed: invalid int value: '999"),
        (["--cfg-scale", "9" * 5000], "true_cfg_scale=inf: give a finite number"),
        (["--extra", "strength=" + "9" * 5000], "--extra strength=999"),
        (["--" + "x" * 100_000], "no option --xxx"),
        (["--device", "x" * 100_000], "device='xxx"),
        (["--device", "gpu"], "device='gpu': give"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--parallel", "atuo"], "parallel_config='atuo': give"),
        (["--parallel", "auto", "--usp", "2"], "--parallel chooses ulysses_degree: leave out one of the two"),
        (["--parallel", "auto", "--model", "no such model"], "unknown model 'no such model'"),
        (["--lora", "style"], "--lora style: give NAME=PATH"),
        (["--lora", "style=a", "--lora", "style=b"], "there is a style already"),
        (["--lora", "style=a@1e999"], "lora="),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    prompt = ["--prompt", "a red circle"] if words else []
    assert run(*prompt, *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert len(err) < 2500
    assert sorted(path.name for path in Path().iterdir()) == ["file"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--width", "70"],
            "width=70: QwenImagePipeline needs a multiple of 8, and draws multiples of 16; nearest: 64 or 80",
        ),
        (["--guidance-scale", "3"], "QwenImagePipeline would ignore guidance_scale=3.0"),
        (["--num-frames", "5"], "QwenImagePipeline does not take num_frames (given: 5)"),
        (["--fps", "5"], "QwenImagePipeline does not take fps (given: 5.0)"),
        (["--extra", "strength=0.5"], "QwenImagePipeline does not take 'strength' from extra_args"),
        (["--output", "drawn.mp4"], "QwenImagePipeline makes pictures, and --output drawn.mp4 is a video file"),
        (["--output", "drawn.wav"], "QwenImagePipeline makes pictures, and --output drawn.wav is a sound file"),
        (["--attention-backend", "nothing"], "no attention kernel is called 'nothing'"),
        (["--attention-strategy", "nothing"], "no attention strategy is called 'nothing'"),
    ],
)
def test_what_the_pipeline_refuses_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--prompt", "a red circle", "--device", "cpu", *words) == 2
    err = capsys.readouterr().err
    assert message in err
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


def test_a_file_says_what_it_was_drawn_with(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "ein Käse", "--seed", "3", "--cfg-scale", "2", "--negative-prompt", "x", *SMALL]
    assert run(*words, "--output", "kept.jpg") == 0
    assert run(*words, "--output", "kept.png") == 0
    assert run(*words, "--output", "bare.png", "--no-metadata") == 0
    capsys.readouterr()
    for name in ("kept.jpg", "kept.png"):
        assert main(["info", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {
            "prompt": "ein Käse", "negative_prompt": "x", "seed": 3, "width": 64, "height": 64,
            "num_inference_steps": 2, "true_cfg_scale": 2.0, "model": "omni-sp/shapes",
            "layout": "1 rank, nothing is split", "version": f"Omni-SP {omni_sp.__version__}",
        }  # fmt: skip
    assert main(["info", "kept.png"]) == 0
    assert "prompt                  ein Käse\n" in capsys.readouterr().out
    for name in ("bare.png", "missing.png"):
        assert main(["info", name]) == 2
    assert "bare.png keeps nothing about how it was drawn" in capsys.readouterr().err
    with Image.open("kept.png") as kept, Image.open("bare.png") as bare:
        assert kept.tobytes() == bare.tobytes()


def test_numbers_several_pictures() -> None:
    prompts = ["--prompt", "a red circle", "--prompt", "a star"]
    assert run(*prompts, "--num-images-per-prompt", "2", *SMALL, "--output", "many.png") == 0
    assert sorted(path.name for path in Path().iterdir()) == [f"many-{number}.png" for number in range(1, 5)]


def output(**made: Any) -> OmniRequestOutput:
    """What Omni gives for one prompt."""
    return OmniRequestOutput("request-0", "a", metrics={"fps": 8.0, "sampling_rate": 16000}, **made)


def frames(number: int, width: int = 32, height: int = 16) -> list[Image.Image]:
    return [Image.new("RGB", (width, height), (200, 20 * index, 0)) for index in range(number)]


def tone(seconds: float, channels: int = 2) -> Any:
    wave_form = np.sin(np.arange(int(16000 * seconds)) * 0.2, dtype=np.float32)
    return np.stack([wave_form * (0.5 + index) for index in range(channels)])


def test_a_folder_keeps_what_it_has() -> None:
    for _ in range(2):
        files = OutputFiles("pictures", num_outputs=1)
        assert list(files.save(output(images=[Image.new("RGB", (1, 1))])))
    assert sorted(path.name for path in Path("pictures").iterdir()) == ["picture-0001.png", "picture-0002.png"]


def test_a_folder_keeps_a_sound_whose_video_is_gone() -> None:
    Path("films").mkdir()
    Path("films/video-0001.wav").write_bytes(b"from before")
    video, _ = OutputFiles("films", num_outputs=1).save(output(videos=[frames(5, width=31)], audios=[tone(0.5)]))
    assert video.startswith("video   films/video-0002.mp4")
    assert Path("films/video-0001.wav").read_bytes() == b"from before"


def test_asking_where_pictures_could_go_creates_nothing() -> None:
    OutputFiles("a/b/c.png", num_outputs=1)
    OutputFiles("pictures/", num_outputs=3)
    OutputFiles(None, num_outputs=3)
    with pytest.raises(ConfigError):
        OutputFiles("picture.nothing", num_outputs=1)
    assert list(Path().iterdir()) == []


def test_layers_of_one_picture_are_numbered() -> None:
    lines = list(OutputFiles("layers.png", num_outputs=1).save(output(images=frames(3))))
    assert lines == [f"picture layers-{number}.png" for number in (1, 2, 3)]


def test_pictures_to_read_are_upright_and_keep_transparency() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    Image.new("RGB", (4, 2)).save("turned.jpg", exif=exif)
    Image.new("L", (4, 2)).save("grey.png")
    Image.new("RGBA", (4, 2)).save("clear.png")
    assert [(read_picture(name).mode, read_picture(name).size) for name in ("turned.jpg", "grey.png", "clear.png")] == [
        ("RGB", (2, 4)),
        ("RGB", (4, 2)),
        ("RGBA", (4, 2)),
    ]


def read_sound(path: str | Path) -> tuple[int, int, Any]:
    with wave.open(str(path)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels())
        return file.getframerate(), file.getsampwidth(), samples.T


def test_sounds_are_written_as_they_are() -> None:
    sound = tone(0.5)
    assert list(OutputFiles("tone.wav", num_outputs=1).save(output(audios=[sound]))) == [
        "sound   tone.wav  0.5 s, 16000 Hz"
    ]
    rate, width, samples = read_sound("tone.wav")
    assert (rate, width, samples.shape) == (16000, 2, (2, 8000))
    assert np.abs(samples / 32767 - sound.clip(-1, 1)).max() < 1e-4, "what is too loud is cut, never turned over"


def test_a_video_with_sound_is_one_file() -> None:
    import av

    files = OutputFiles("seen.mp4", num_outputs=1)
    assert list(files.save(output(videos=[frames(8)], audios=[tone(1.0)]))) == [
        "video   seen.mp4  8 frames, 8 a second, with sound"
    ]
    with av.open("seen.mp4") as film:
        (picture,), (sound,) = film.streams.video, film.streams.audio
        assert (picture.frames, float(picture.average_rate or 0), picture.width, picture.height) == (8, 8.0, 32, 16)
        assert (sound.rate, sound.channels) == (16000, 2)
        heard = np.concatenate([frame.to_ndarray() for frame in film.decode(sound)], axis=1)
    assert heard.shape[1] / 16000 == pytest.approx(1.0, abs=0.2)
    assert heard.std() > 0.1


@pytest.mark.parametrize(
    ("fps", "width", "has_av", "message"),
    [
        (8.0, 32, False, "PyAV, which puts both into one file, is not installed: pip install av"),
        (7.5, 32, True, "7.5 frames a second are no whole number"),
        (8.0, 31, True, "31 x 16 pixels are odd"),
    ],
)
def test_sound_gets_a_file_of_its_own_where_it_must(
    monkeypatch: pytest.MonkeyPatch, fps: float, width: int, has_av: bool, message: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found(name) if has_av or name != "av" else None)
    made = output(videos=[frames(5, width=width)], audios=[tone(0.5)])
    made.metrics["fps"] = fps
    video, sound = OutputFiles("films/", num_outputs=1).save(made)
    assert video == f"video   films/video-0001.mp4  5 frames, {fps:g} a second"
    assert sound.startswith("sound   films/video-0001.wav  0.5 s, 16000 Hz  (in a file of its own: ")
    assert message in sound
    assert read_sound("films/video-0001.wav")[2].shape == (2, 8000)
    assert sorted(path.name for path in Path("films").iterdir()) == ["video-0001.mp4", "video-0001.wav"]


def test_a_file_is_there_when_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop_in_the_middle(_sound: Any, path: Path, _rate: int) -> None:
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(omni_sp.files, "write_sound", stop_in_the_middle)
    Path("tone.wav").write_bytes(b"from before")
    files = OutputFiles("tone.wav", num_outputs=1)
    with pytest.raises(KeyboardInterrupt):
        list(files.save(output(audios=[tone(0.1)])))
    assert [path.name for path in Path().iterdir()] == ["tone.wav"]
    assert Path("tone.wav").read_bytes() == b"from before"
    assert files.saved == []


class FakeOmni:
    """Draws one picture, then fails; knows what it was asked."""

    asked: OmniDiffusionSamplingParams | None = None
    capabilities = PipelineCapabilities(name="FakePipeline", parameters={"prompt": None, "guidance_scale": 5.0})
    is_main = True

    def __init__(self, *_: Any, **__: Any) -> None:
        self.info = Ready(
            rank=0, ranks=1, layout="", capabilities=self.capabilities, device="cpu", dtype="float32", load_s=0.0
        )

    def __enter__(self) -> FakeOmni:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def generate_each(self, prompts: list[Prompt], params: OmniDiffusionSamplingParams) -> Iterator[OmniRequestOutput]:
        type(self).asked = params
        metrics = {"total_s": 1, "text_encoder_s": 1, "vae_s": 1, "denoise_step_s": 1, "num_steps": 1, "tokens": {}}
        image = Image.new("RGB", (1, 1))
        yield OmniRequestOutput("request-0", prompts[0].text or "", images=[image], metrics=metrics | {"seed": 1})
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


class FakeFilm(FakeOmni):
    """Draws a video for every prompt."""

    capabilities = PipelineCapabilities(name="Film", parameters={"prompt": None, "image": None}, makes_videos=True)
    prompts: ClassVar[list[Prompt]] = []

    def generate_each(self, prompts: list[Prompt], params: OmniDiffusionSamplingParams) -> Iterator[OmniRequestOutput]:
        type(self).asked, type(self).prompts = params, prompts
        metrics = {"total_s": 1, "text_encoder_s": 1, "vae_s": 1, "denoise_step_s": 1, "num_steps": 1, "tokens": {}}
        metrics |= {"dropped_tokens": {"tokenizer": 3}}
        for _ in prompts:
            yield OmniRequestOutput("request-0", "a", videos=[frames(5)], metrics=metrics | {"seed": 1, "fps": 24.0})


def test_videos_go_into_a_folder_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(omni_sp.omni, "Omni", FakeFilm)
    Image.new("RGB", (4, 4)).save("one.png")
    Image.new("RGBA", (4, 4)).save("two.png")
    words = [
        "--image",
        "one.png",
        "--image",
        "two.png",
        "--num-frames",
        "5",
        "--fps",
        "24",
        "--max-sequence-length",
        "9",
    ]
    words += [
        "--true-cfg-scale",
        "2",
        "--num-outputs-per-prompt",
        "1",
        "--extra",
        "strength=0.5",
        "--extra",
        'mode="a"',
    ]
    assert run("--prompt", "a", "--prompt", "b", *words) == 0
    assert FakeFilm.asked == OmniDiffusionSamplingParams(
        num_frames=5,
        fps=24.0,
        max_sequence_length=9,
        true_cfg_scale=2.0,
        num_outputs_per_prompt=1,
        extra_args={"strength": 0.5, "mode": "a"},
    )
    assert [prompt.text for prompt in FakeFilm.prompts] == ["a", "b"]
    assert [[image.mode for image in prompt.image] for prompt in FakeFilm.prompts] == [["RGB", "RGBA"]] * 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "video   videos/video-0002.mp4  5 frames, 24 a second"
    assert lines[-2] == "note    the prompt is longer than the model reads: tokenizer dropped 3 tokens at its end"
    assert sorted(path.name for path in Path("videos").iterdir()) == ["video-0001.mp4", "video-0002.mp4"]


def test_a_picture_alone_is_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(omni_sp.omni, "Omni", FakeFilm)
    Image.new("RGB", (4, 4)).save("one.png")
    assert run("--image", "one.png", "--output", "film.mp4") == 0
    assert [prompt.text for prompt in FakeFilm.prompts] == [None]
    assert Path("film.mp4").exists()


def test_what_cannot_be_written_is_refused_before_drawing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(omni_sp.omni, "Omni", FakeFilm)
    monkeypatch.setattr(FakeFilm, "asked", None)
    assert run("--prompt", "a", "--output", "film.png") == 2
    assert (
        "Film makes videos, and --output film.png is a picture file: use .mp4, or a folder" in capsys.readouterr().err
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    message = "writing a video needs imageio and imageio-ffmpeg: pip install '.[video]'"
    assert run("--prompt", "a", "--output", "films") == 2
    assert message in capsys.readouterr().err
    assert FakeFilm.asked is None
    monkeypatch.setattr(omni_sp.omni, "Omni", None)  # where the suffix tells, nothing is loaded for it
    assert run("--prompt", "a", "--output", "film.mp4") == 2
    assert message in capsys.readouterr().err


def test_a_sound_of_unknown_rate_is_refused_before_drawing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(omni_sp.omni, "Omni", FakeOmni)
    monkeypatch.setattr(FakeOmni, "capabilities", PipelineCapabilities(name="Song", parameters={}, makes_sounds=True))
    assert run("--prompt", "a") == 2
    assert "Song does not say its sampling rate" in capsys.readouterr().err


def test_ctrl_c_in_the_middle_keeps_what_is_finished_and_leaves_no_process() -> None:
    words = [str(ROOT / "examples" / "text_to_image.py"), "--output", "pictures", "--device", "cpu", "--usp", "2"]
    words += ["--prompt", "a red circle", "--prompt", "a star", "--num_inference_steps", "100"]
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
        ranks = rank_processes(program.pid)
        program.send_signal(signal.SIGINT)
        _, err = program.communicate(timeout=30)
    assert program.returncode == 130
    picture = Path("pictures/picture-0001.png")
    assert err == f"omni-sp: stopped by Ctrl-C (finished before and kept: {picture})\n"
    with Image.open(picture) as image:
        assert image.size == (16, 16)
    assert len(ranks) == 2
    assert not any(alive(rank) for rank in ranks)
