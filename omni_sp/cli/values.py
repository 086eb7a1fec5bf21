"""What the values of options mean that are written in a form of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omni_sp.errors import ConfigError, SamplingParamsError


def unless_auto(value: str) -> str | None:
    """A value, or None for "auto"."""
    return None if value == "auto" else value


def extra_args(entries: Sequence[str]) -> dict[str, Any]:
    """Arguments of a pipeline, of NAME=JSON."""
    found = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals or not name:
            raise SamplingParamsError(f"--extra {entry}: give NAME=JSON, such as strength=0.6")
        if name == "output_type":
            raise SamplingParamsError(
                "--extra output_type: files are written from finished results; use Omni(...) for others"
            )
        try:
            found[name] = json.loads(value)
        except ValueError as error:
            raise SamplingParamsError(
                f"--extra {entry}: {value!r} is no JSON; text needs quotes of its own: --extra '{name}=\"{value}\"'"
            ) from error
    return found


def sizes(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Heights and widths, of HEIGHTxWIDTH."""
    found = []
    for text in texts:
        sides = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
        if sides is None:
            raise ConfigError(f"--warmup {text}: give HEIGHTxWIDTH in pixels, such as 1024x768")
        found.append((int(sides[1]), int(sides[2])))
    return found


def lora_entries(entries: Sequence[str]) -> dict[str, tuple[str, float | None]]:
    """Each adapter's path and scale by its name, of NAME=PATH and NAME=PATH@SCALE."""
    found: dict[str, tuple[str, float | None]] = {}
    for entry in entries:
        name, _, path = entry.partition("=")
        if not name or not path:
            raise ConfigError(f"--lora {entry}: give NAME=PATH, such as style=loras/style.safetensors")
        if name in found:
            raise ConfigError(f"--lora {entry}: there is a {name} already")
        scaled = None if Path(path).exists() else re.fullmatch(r"(.+)@([-+]?\d*\.?\d+(?:e[-+]?\d+)?)", path)
        found[name] = (scaled[1], float(scaled[2])) if scaled else (path, None)
    return found


def adapters(entries: Sequence[str]) -> dict[str, str]:
    """Each adapter's path by its name."""
    return {name: path for name, (path, _) in lora_entries(entries).items()}


def adapters_of_a_server(entries: Sequence[str]) -> dict[str, str]:
    """The same, where no scale may be given."""
    for name, (path, scale) in lora_entries(entries).items():
        if scale is not None:
            raise ConfigError(f"--lora {name}={path}@{scale:g}: each request gives the scale; leave out @{scale:g}")
    return adapters(entries)


def keys_in(path: Path) -> tuple[str, ...]:
    """The keys in a file, one a line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path} cannot be read: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise ConfigError(f"--api-key-file {path} holds no key: anybody would be let in")
    return keys
