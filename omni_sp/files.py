"""Image files that the command line reads, and the files that it writes results to."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni_sp.errors import ConfigError, InvalidInputError
from omni_sp.pipelines.export import complete_file, export_video, require_video_writer, write_sound

if TYPE_CHECKING:
    from PIL import Image

    from omni_sp.outputs import OmniRequestOutput
    from omni_sp.pipelines.capabilities import PipelineCapabilities

_SUFFIXES = {"picture": ".png", "video": ".mp4", "sound": ".wav"}


def read_picture(path: str) -> Image.Image:
    """Read the image file of an ``--image`` option, upright, as RGB, or as RGBA where it has transparency."""
    from omni_sp.pipelines.images import decode_image

    try:
        return decode_image(Path(path).expanduser())
    except InvalidInputError as error:
        raise ConfigError(f"--image {path} cannot be read: {error}") from error


class OutputFiles:
    """Where results go: into the file that is named, into numbered ones if there are several, or into a folder.

    Constructing it creates nothing on disk.

    Args:
        path: a folder (one that exists, or a name that ends in a slash or has no suffix), or a file; None for a folder
            "pictures", "videos" or "sounds".
        num_outputs: how many results there will be.
        metadata: whether files of pictures keep what they were drawn with.

    Attributes:
        saved: the files that have been written. A file appears when it is complete.

    Raises:
        ConfigError: no kind of result has this suffix, a package is missing, or nothing can be written there.
    """

    def __init__(self, path: str | None, num_outputs: int, *, metadata: bool = True) -> None:
        self.saved: list[Path] = []
        self._keeps_metadata = metadata
        self._path = path
        self._several = num_outputs > 1
        self._digits = len(str(num_outputs))
        self._num_named = 0
        self._target = Path(path or "pictures").expanduser()
        try:
            is_there = self._target.is_dir()
            self._is_folder = is_there or path is None or path.endswith(os.sep) or not self._target.suffix
            self._kind = None if self._is_folder else _kind_of(self._target)
            if self._kind == "video":
                require_video_writer()
            _require_writable(self._target if self._is_folder else self._target.parent)
        except OSError as error:
            raise ConfigError(f"--output {self._target} cannot be written: {error.strerror or error}") from error

    def expect(self, capabilities: PipelineCapabilities) -> None:
        """Make sure, before anything is generated, that what this pipeline makes can be written.

        Raises:
            ConfigError: it makes something else than the file's suffix says, or a package is missing.
        """
        if self._kind not in (None, capabilities.makes):
            is_image = capabilities.makes == "picture"
            suffixes = "an image suffix such as .png" if is_image else _SUFFIXES[capabilities.makes]
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
        """Write the results of one prompt, and yield a line for people about each file that has been written."""
        from omni_sp.pipelines.metadata import save_options

        several = self._several or max(len(output.images), len(output.videos), len(output.audios)) > 1
        for image in output.images:
            path = self._next("picture", several)
            kept = save_options(_format_of(path), image, output.settings) if self._keeps_metadata else {}
            with complete_file(path) as part:
                image.save(part, **kept)
            self.saved.append(path)
            yield f"picture {path}"
        sounds: list[Any] = list(output.audios)
        for frames in output.videos:
            sound = sounds.pop(0) if sounds else None
            yield from self._save_video(self._next("video", several), frames, sound, output.metrics)
        for sound in sounds:
            path, rate = self._next("sound", several), output.metrics["sampling_rate"]
            with complete_file(path) as part:
                write_sound(sound, part, rate)
            self.saved.append(path)
            yield _sound_line(path, sound, rate)

    def _save_video(self, path: Path, frames: list[Any], sound: Any, metrics: dict[str, Any]) -> Iterator[str]:
        fps, rate, sound_path = metrics["fps"], metrics.get("sampling_rate"), path.with_suffix(".wav")
        written = export_video(
            frames, path, fps, sound=sound, sampling_rate=rate, sound_path=sound_path, on_file=self.saved.append
        )
        with_sound = ", with sound" if written.placement == "inside" else ""
        yield f"video   {path}  {len(frames)} frames, {fps:g} a second{with_sound}"
        if written.placement == "omitted":
            yield f"sound   left out: {written.reason}"
        elif written.placement == "separate":
            yield f"{_sound_line(sound_path, sound, rate)}  (in a file of its own: {written.reason})"

    def _next(self, kind: str, several: bool) -> Path:
        self._num_named += 1
        number = self._num_named
        if self._is_folder:
            # A video's sound may need a file beside it, of the same name.
            suffixes = {_SUFFIXES[kind], _SUFFIXES["sound"]} if kind == "video" else {_SUFFIXES[kind]}
            while any((self._target / f"{kind}-{number:04}{suffix}").exists() for suffix in suffixes):
                number += 1
            return self._target / f"{kind}-{number:04}{_SUFFIXES[kind]}"
        if several:
            return self._target.with_stem(f"{self._target.stem}-{number:0{self._digits}}")
        return self._target


def _sound_line(path: Path, sound: Any, rate: int | None) -> str:
    assert rate is not None, "a sound of unknown rate is not written"
    return f"sound   {path}  {sound.shape[1] / rate:.1f} s, {rate} Hz"


def _format_of(path: Path) -> str:
    """Pillow's name of the format that a suffix says; "" for none."""
    from PIL import Image

    return Image.registered_extensions().get(path.suffix.lower(), "")


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
