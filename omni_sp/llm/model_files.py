"""Files of a model that is a folder, or an id on the hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

_HUB_TIMEOUT_S = 10


def model_file(model: str | os.PathLike[str], name: str) -> Path:
    """The path of a single file of a model, fetched from the hub where the model is no folder.

    Raises:
        Exception: the file cannot be had, or the hub does not answer within the time-out. Which class says so depends
            on the hub client's version.
    """
    folder = Path(model).expanduser()
    return folder / name if folder.is_dir() else _from_hub(os.fspath(model), name)


def model_folder(model: str | os.PathLike[str], patterns: Sequence[str]) -> Path:
    """The folder of a model, with those of its files that match a pattern, fetched from the hub where it is none here.

    Raises:
        Exception: as of model_file().
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(os.fspath(model), allow_patterns=list(patterns), etag_timeout=_HUB_TIMEOUT_S))


def _from_hub(repo: str, name: str) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(repo, name)
    if isinstance(cached, str):
        return Path(cached)
    get_hf_file_metadata(hf_hub_url(repo, name), timeout=_HUB_TIMEOUT_S)  # one request, without retries
    return Path(hf_hub_download(repo, name))
