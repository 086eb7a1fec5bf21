"""What the operator of a server decides. Frozen; what is running lives in the application's state."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from omni_sp.errors import ConfigError
from omni_sp.validation import require_int, require_number

LOG_LEVELS, LOG_FORMATS = ("debug", "info", "warning", "error"), ("text", "json")
_MIB = 2**20
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+|\*|null")
_ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]{1,100}){1,10}")
_POSITIVE = (
    "max_body_bytes", "max_pixels", "max_images", "max_input_pixels", "max_steps", "max_n", "max_frames",
    "max_video_pixel_steps", "file_max_total_bytes",
)  # fmt: skip
_SECONDS = (
    "drain_timeout_s", "header_timeout_s", "body_timeout_s", "answer_timeout_s", "keep_alive_s", "file_max_age_s",
)  # fmt: skip


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
        max_input_pixels: width × height of all of them together, a mask included.
        max_steps: denoising steps that one request may ask for.
        max_n: results that one request may ask for.
        max_frames: frames of a video.
        max_video_pixel_steps: width × height × frames × denoising steps of a video, which is what it costs.
        max_queue_length: requests that may wait; None for any number.
        drain_timeout_s: seconds that the running request may go on once the server is to end.
        header_timeout_s: seconds that the head of a request may take.
        body_timeout_s: the longest pause, in seconds, of a client that sends the body of its request; and what the
            body may take in all, beside a second for each KiB.
        answer_timeout_s: the longest pause, in seconds, of a client that is to take an answer.
        keep_alive_s: pause in seconds after which a stream sends a sign that it is still there.
        metadata: keep in the files of pictures what they were drawn with: prompt, seed, size, steps and so on.
        allow_url_images: fetch pictures that requests name by http(s) URL (public addresses only).
        file_max_age_s: seconds that finished pictures and videos are kept.
        file_max_total_bytes: the most bytes of them that are kept.
        log_level: "debug", "info" (a line for each request), "warning" or "error".
        log_format: "text", or "json" for an object a line.
        ssl_certfile: serve HTTPS with this certificate (PEM, with those between it and the root).
        ssl_keyfile: its key; None where the certificate's file has it.
        root_path: the path below which a proxy shows this server, such as "/draw".
        forwarded_allow_ips: addresses or networks of proxies, with commas, whose X-Forwarded-Proto and -Host are taken
            for URLs in answers; "*" for all.

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
    max_input_pixels: int = 4 * 4096 * 4096
    max_steps: int = 200
    max_n: int = 10
    max_frames: int = 1025
    max_video_pixel_steps: int = 50_000_000_000
    max_queue_length: int | None = 64
    drain_timeout_s: float = 60.0
    header_timeout_s: float = 20.0
    body_timeout_s: float = 60.0
    answer_timeout_s: float = 120.0
    keep_alive_s: float = 15.0
    metadata: bool = True
    allow_url_images: bool = False
    file_max_age_s: float = 24 * 3600.0
    file_max_total_bytes: int = 4096 * _MIB
    log_level: str = "info"
    log_format: str = "text"
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    root_path: str = ""
    forwarded_allow_ips: str = "127.0.0.1,::1"

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
        for origin in self.allow_origins:
            if not _ORIGIN.fullmatch(origin):  # it would equal none that a browser sends
                raise ConfigError(
                    f"allow_origins holds {origin[:80]!r}: give origins as browsers send them, such as "
                    "https://example.org, without a slash at the end, or * for all"
                )
        for name, known in (("log_level", LOG_LEVELS), ("log_format", LOG_FORMATS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r}: give one of {', '.join(known)}")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ConfigError("ssl_keyfile without ssl_certfile: give the certificate too")
        if self.root_path and not _ROOT_PATH.fullmatch(self.root_path):
            raise ConfigError(
                f"root_path={self.root_path[:80]!r}: give a path such as /draw, without a slash at its end"
            )
        if self.root_path.split("/")[1:2] == ["v1"]:
            raise ConfigError(f"root_path={self.root_path!r}: /v1 is the API's own; give another path")
        try:
            trusted_networks(self.forwarded_allow_ips)
        except ValueError as error:
            hint = "give addresses or networks with commas between them, or *"
            raise ConfigError(f"forwarded_allow_ips={self.forwarded_allow_ips[:80]!r}: {hint} ({error})") from error

    @property
    def names(self) -> tuple[str, ...]:
        """The names by which requests may call the model; the first is the one that answers give."""
        return self.served_model_names or (self.model,)


def trusted_networks(allow_ips: str) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """The addresses and networks in ``forwarded_allow_ips``. ValueError where one of them is none."""
    texts = ["0.0.0.0/0", "::/0"] if allow_ips.strip() == "*" else allow_ips.split(",")
    return [ipaddress.ip_network(text.strip(), strict=False) for text in texts if text.strip()]
