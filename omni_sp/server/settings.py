"""What the operator of a server decides. Frozen; what is running lives in the application's state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omni_sp.errors import ConfigError
from omni_sp.validation import require_int, require_number

_MIB = 2**20
_POSITIVE = (
    "max_body_bytes", "max_pixels", "max_images", "max_steps", "max_n", "max_frames", "file_max_total_bytes",
)  # fmt: skip
_SECONDS = ("drain_timeout_s", "body_timeout_s", "keep_alive_s", "file_max_age_s")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a server listens, what it allows and where it keeps files.

    Attributes:
        model: the name that ``GET /v1/models`` shows and that requests may give.
        served_model_names: names instead of it.
        host: the address to listen on.
        port: the port to listen on; 0 takes a free one.
        api_keys: any of them opens /v1; without one, whoever reaches the port may draw.
        allow_origins: web pages of these origins ("https://example.org") may call the API from a browser.
        data_dir: where jobs, videos and pictures are kept; None for a temporary folder that ends with the server.
        max_body_bytes: the size of one request, uploaded pictures included.
        max_pixels: width × height of a picture, or of a video's frame, that is drawn or uploaded.
        max_images: pictures that one request may upload.
        max_steps: denoising steps that one request may ask for.
        max_n: results that one request may ask for.
        max_frames: frames of a video.
        max_queue_length: requests that may wait; None for any number.
        drain_timeout_s: seconds that the running request may go on once the server is to end.
        body_timeout_s: the longest pause, in seconds, of a client that sends its request.
        keep_alive_s: pause in seconds after which a stream sends a sign that it is still there.
        allow_url_images: fetch pictures that requests name by http(s) URL (public addresses only).
        file_max_age_s: seconds that finished pictures and videos are kept.
        file_max_total_bytes: the most bytes of them that are kept.

    Raises:
        ConfigError: a value that cannot be.
    """

    model: str = "omni-sp/shapes"
    served_model_names: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8091
    api_keys: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    data_dir: Path | None = None
    max_body_bytes: int = 64 * _MIB
    max_pixels: int = 4096 * 4096
    max_images: int = 16
    max_steps: int = 200
    max_n: int = 10
    max_frames: int = 1025
    max_queue_length: int | None = 64
    drain_timeout_s: float = 60.0
    body_timeout_s: float = 60.0
    keep_alive_s: float = 15.0
    allow_url_images: bool = False
    file_max_age_s: float = 24 * 3600.0
    file_max_total_bytes: int = 4096 * _MIB

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            require_int(name, getattr(self, name), minimum=1, error=ConfigError)
        for name in _SECONDS:
            hint = "give a number of seconds above 0"
            require_number(name, getattr(self, name), above=0, error=ConfigError, hint=hint)
        if self.max_queue_length is not None:
            hint = "give 0 or more, or None for any number"
            require_int("max_queue_length", self.max_queue_length, minimum=0, error=ConfigError, hint=hint)
        hint = "give 1 to 65535, or 0 for a free one"
        require_int("port", self.port, minimum=0, maximum=65535, error=ConfigError, hint=hint)
        if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in self.api_keys):
            raise ConfigError("an API key is empty or holds characters that an HTTP header cannot carry")

    @property
    def names(self) -> tuple[str, ...]:
        """The names by which requests may call the model; the first is the one that answers give."""
        return self.served_model_names or (self.model,)
