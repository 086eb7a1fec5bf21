"""The events of a request, as ``AsyncOmni.generate`` yields them."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from omni_sp.errors import OmniSPError
from omni_sp.outputs import OmniRequestOutput


@dataclass(frozen=True, kw_only=True)
class RequestQueued:
    """The first event of every request, which comes again whenever the position changes.

    Attributes:
        position: requests that come before it, running ones too.
    """

    request_id: str
    position: int


@dataclass(frozen=True, kw_only=True)
class RequestProgress:
    """Denoising steps were done. After a restart of the ranks they begin at 0 again.

    Attributes:
        preview: a small picture of the intermediate result, where previews were asked for and the pipeline allows them.
        previews: one of each picture of the request; ``preview`` is the first of them.
        note: what takes long just now, such as a compilation.
    """

    request_id: str
    done: int
    total: int
    preview: Image.Image | None = None
    previews: tuple[Image.Image, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class RequestDone:
    """The last event of a request that went well."""

    request_id: str
    output: OmniRequestOutput


@dataclass(frozen=True, kw_only=True)
class RequestFailed:
    """The last event of a request that did not; the error is a RequestAbortedError where somebody aborted it."""

    request_id: str
    error: OmniSPError


RequestEvent = RequestQueued | RequestProgress | RequestDone | RequestFailed
