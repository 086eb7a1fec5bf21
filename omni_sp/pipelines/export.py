"""Videos and sounds as files, written by diffusers' own exporters and by the standard library."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omni_sp.errors import ConfigError

_PACKAGES = {"imageio": "imageio", "imageio_ffmpeg": "imageio-ffmpeg"}


@dataclass(frozen=True)
class ExportedSound:
    """Where the sound of a video is, once export_video() has written both.

    Attributes:
        placement: "inside" the file of the video, "separate" in a file of its own, "omitted" where nothing could be
            written, or "none" where the video has no sound.
        reason: why the sound is not inside the file of the video, for people; None where it is, or where there is none.
    """

    placement: Literal["inside", "separate", "omitted", "none"]
    reason: str | None = None


def require_video_writer() -> None:
    """Make sure that videos can be written, before one is generated."""
    missing = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"writing a video needs {' and '.join(missing)}: pip install '.[video]'")
    import imageio_ffmpeg

    try:
        imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise ConfigError(
            f"imageio-ffmpeg finds no ffmpeg: install one, or set IMAGEIO_FFMPEG_EXE ({error})"
        ) from error


def write_video(frames: list[Any], path: Path, fps: float) -> None:
    """Write PIL images as an .mp4 without sound. Odd sides are widened by a pixel, since the codec takes even ones."""
    from diffusers.utils import export_to_video

    export_to_video(frames, str(path), fps=fps, macro_block_size=2)


def export_video(
    frames: list[Any],
    path: Path,
    fps: float,
    *,
    sound: Any = None,
    sampling_rate: int | None = None,
    sound_path: Path,
    on_file: Callable[[Path], object] = lambda path: None,
) -> ExportedSound:
    """Write a video with its sound: into one .mp4, or the sound as a .wav beside it where one file cannot hold both.

    Each file appears under its name when it is complete. The video is complete before the sound is begun.

    Args:
        sound: float array of shape (channels, samples) in -1 … 1, or None.
        sampling_rate: samples a second; None where nobody knows, and then the sound is left out.
        on_file: called with the path of each file once it is complete.
    """
    result = ExportedSound("none")
    if sound is not None and sampling_rate is None:
        result = ExportedSound("omitted", "the pipeline does not say its sampling rate")
    elif sound is not None:
        reason = why_no_sound_inside(frames, fps, sound)
        result = ExportedSound("inside") if reason is None else ExportedSound("separate", reason)
    with complete_file(path) as part:
        if result.placement == "inside" and sampling_rate is not None:
            write_video_with_sound(frames, sound, part, fps, sampling_rate)
        else:
            write_video(frames, part, fps)
    on_file(path)
    if result.placement == "separate" and sampling_rate is not None:
        with complete_file(sound_path) as part:
            write_sound(sound, part, sampling_rate)
        on_file(sound_path)
    return result


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which becomes ``path`` at the end of the block, and is deleted if the block raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def why_no_sound_inside(frames: list[Any], fps: float, sound: Any) -> str | None:
    """Return the reason why write_video_with_sound() cannot write these; None where it can."""
    if importlib.util.find_spec("av") is None:
        return "PyAV, which puts both into one file, is not installed: pip install av"
    if not float(fps).is_integer():
        return f"{fps:g} frames a second are no whole number, and diffusers' encoder of sound takes no other"
    width, height = frames[0].size
    if width % 2 or height % 2:
        return f"{width} x {height} pixels are odd, and diffusers' encoder of sound takes even sizes"
    return None if sound.shape[0] <= 2 else f"{sound.shape[0]} channels do not fit into a video file"


def write_video_with_sound(frames: list[Any], sound: Any, path: Path, fps: float, sampling_rate: int) -> None:
    """Write PIL images and a sound, a float array of shape (channels, samples) in -1 … 1, as one .mp4."""
    import torch
    from diffusers.utils import encode_video

    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        encode_video(frames, int(fps), str(path), audio=torch.from_numpy(sound), audio_sample_rate=sampling_rate)


def write_sound(sound: Any, path: Path, sampling_rate: int) -> None:
    """Write a sound of shape (channels, samples) as a .wav of 16 bits; values beyond -1 … 1 are clipped."""
    samples = (sound.clip(-1.0, 1.0) * 32767).round().astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[0])
        file.setsampwidth(2)
        file.setframerate(sampling_rate)
        file.writeframes(samples.T.tobytes())
