"""Pictures to read, and the files that pictures, videos and sounds are written to."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni_sp.errors import ConfigError
from omni_sp.pipelines.export import (
    require_video_writer,
    why_no_sound_inside,
    write_sound,
    write_video,
    write_video_with_sound,
)

if TYPE_CHECKING:
    from omni_sp.outputs import OmniRequestOutput
    from omni_sp.pipelines.capabilities import PipelineCapabilities

_SUFFIXES = {"picture": ".png", "video": ".mp4", "sound": ".wav"}


def read_picture(path: str) -> Any:
    """A picture file as a PIL picture: upright, RGB, or RGBA where it has transparency.

    Raises:
        ConfigError: it cannot be read.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(Path(path).expanduser()) as file:
            picture = ImageOps.exif_transpose(file)
            return picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"--image {path} cannot be read: {error}") from error


class OutputFiles:
    """Where results go: a file of its own name, numbered names where there are several, or new names in a folder.

    Args:
        path: a folder (it exists, ends in a slash, or has no suffix), or a file; None for a folder "pictures", "videos"
            or "sounds". num_outputs: how many there will be.

    Attributes:
        saved: what has been written so far. A file is there when it is whole, never before.

    Raises:
        ConfigError: there are no files of that kind, a package is missing, or nothing can be written there. Nothing is
            created by asking.
    """

    def __init__(self, path: str | None, num_outputs: int) -> None:
        self.saved: list[Path] = []
        self._path = path
        self._several = num_outputs > 1
        self._digits = len(str(num_outputs))
        self._num_named = 0
        self._target = Path(path or "pictures").expanduser()
        self._is_folder = self._target.is_dir() or path is None or path.endswith(os.sep) or not self._target.suffix
        self._kind = None if self._is_folder else _kind_of(self._target)
        if self._kind == "video":
            require_video_writer()
        try:
            _require_writable(self._target if self._is_folder else self._target.parent)
        except OSError as error:
            raise ConfigError(f"--output {self._target} cannot be written: {error.strerror or error}") from error

    def expect(self, capabilities: PipelineCapabilities) -> None:
        """Make sure, before anything is drawn, that what this pipeline makes can be written.

        Raises:
            ConfigError: it makes something else than the file's suffix says, or a package is missing.
        """
        if self._kind not in (None, capabilities.makes):
            suffixes = (
                "an image suffix such as .png" if capabilities.makes == "picture" else _SUFFIXES[capabilities.makes]
            )
            raise ConfigError(
                f"{capabilities.name} makes {capabilities.makes}s, and --output {self._path} is a {self._kind} file: "
                f"use {suffixes}, or a folder"
            )
        if capabilities.makes == "video":
            require_video_writer()
        if capabilities.makes == "sound" and capabilities.sampling_rate is None:
            raise ConfigError(
                f"{capabilities.name} does not say its sampling rate: use Omni(...), and write the sounds yourself"
            )
        if self._path is None:
            self._target = Path(f"{capabilities.makes}s")

    def save(self, output: OmniRequestOutput) -> Iterator[str]:
        """Write what one prompt gave, file by file. Yields a line for people as each is finished."""
        several = self._several or max(len(output.images), len(output.videos), len(output.audios)) > 1
        for image in output.images:
            path = self._next("picture", several)
            with self._whole(path) as part:
                image.save(part)
            yield f"picture {path}"
        sounds: list[Any] = list(output.audios)
        for frames in output.videos:
            sound = sounds.pop(0) if sounds else None
            yield from self._save_video(self._next("video", several), frames, sound, output.metrics)
        for sound in sounds:
            yield self._save_sound(self._next("sound", several), sound, output.metrics["sampling_rate"])

    def _save_video(self, path: Path, frames: list[Any], sound: Any, metrics: dict[str, Any]) -> Iterator[str]:
        fps, rate = metrics["fps"], metrics.get("sampling_rate")
        told = f"video   {path}  {len(frames)} frames, {fps:g} a second"
        reason = None if sound is None else why_no_sound_inside(frames, fps, sound)
        if sound is not None and rate is not None and reason is None:
            with self._whole(path) as part:
                write_video_with_sound(frames, sound, part, fps, rate)
            yield f"{told}, with sound"
            return
        with self._whole(path) as part:
            write_video(frames, part, fps)
        yield told
        if sound is not None and rate is None:
            yield "sound   left out: the pipeline does not say its sampling rate"
        elif sound is not None and rate is not None:
            yield f"{self._save_sound(path.with_suffix('.wav'), sound, rate)}  (in a file of its own: {reason})"

    def _save_sound(self, path: Path, sound: Any, rate: int) -> str:
        with self._whole(path) as part:
            write_sound(sound, part, rate)
        return f"sound   {path}  {sound.shape[1] / rate:.1f} s, {rate} Hz"

    def _next(self, kind: str, several: bool) -> Path:
        self._num_named += 1
        number = self._num_named
        if self._is_folder:
            while (path := self._target / f"{kind}-{number:04}{_SUFFIXES[kind]}").exists():
                number += 1
            return path
        if several:
            return self._target.with_stem(f"{self._target.stem}-{number:0{self._digits}}")
        return self._target

    @contextmanager
    def _whole(self, path: Path) -> Iterator[Path]:
        """A name to write to, which becomes ``path`` when all is written; what was not finished goes away."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.stem}.part{path.suffix}")
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        self.saved.append(path)


def _kind_of(target: Path) -> str:
    from PIL import Image

    suffix = target.suffix.lower()
    for kind in ("video", "sound"):
        if suffix == _SUFFIXES[kind]:
            return kind
    formats = Image.registered_extensions()  # loads pillow's plugins
    if formats.get(suffix) not in Image.SAVE:
        raise ConfigError(
            f"--output {target}: {target.suffix} is no picture, video or sound format; use .png, .jpg or .webp, .mp4, "
            "or .wav"
        )
    return "picture"


def _require_writable(folder: Path) -> None:
    """Raise OSError if nothing could be written into a folder that exists or could be made."""
    while not folder.exists():
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass
