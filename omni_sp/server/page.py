"""``/``, a page to try the server on, and ``GET /v1/info``, what it needs to know of the server."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response

from omni_sp.async_omni import AsyncOmni, EngineStats
from omni_sp.config import MAX_SEED
from omni_sp.errors import EngineClosedError
from omni_sp.pipelines.arguments import frames_per_second
from omni_sp.pipelines.capabilities import PipelineCapabilities
from omni_sp.pipelines.shapes import SHAPES_MODEL, SHAPES_PROMPTS
from omni_sp.server.settings import ServerSettings

# Fields of the page's form, named as in OmniDiffusionSamplingParams.
_FORM_FIELDS = (
    "negative_prompt", "width", "height", "num_frames", "num_inference_steps", "guidance_scale", "true_cfg_scale",
)  # fmt: skip
_COUNTS = ("queued", "running", "done", "failed", "aborted", "restarts", "steps")
# The page's scripts share one scope, so that no file of it needs an address of its own.
_SCRIPTS = ("page.js", "works.js", "gallery.js", "mask.js", "metadata.js")
_POLICY = (
    "connect-src 'self'; img-src blob: data:; media-src blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_INLINE = re.compile(r"<(style|script)>(.*?)</\1>", re.DOTALL)


def create_page_router(omni: AsyncOmni, settings: ServerSettings) -> APIRouter:
    """The routes ``GET /`` (open to everybody: it holds nothing of the server) and ``GET /v1/info``."""
    router = APIRouter()

    @router.get("/", include_in_schema=False, response_class=HTMLResponse)
    async def show() -> Response:
        text, policy = page()
        headers = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
        return HTMLResponse(text, headers={"Content-Security-Policy": policy, **headers})

    @router.get("/v1/info", tags=["server"], summary="What is loaded, how it is spread, and how busy it is")
    async def info() -> dict[str, Any]:
        return server_info(omni, settings)

    return router


def server_info(omni: AsyncOmni, settings: ServerSettings) -> dict[str, Any]:
    """Describe what is loaded, its ranks, what it may be asked for, and what it has done so far.

    Returns:
        ``status`` (of the AsyncOmni), ``model``, counts (``queued``, ``running``, ``done``, ``failed``, ``aborted``,
        ``restarts``, ``steps``), ``replicas`` (of each ``status``, ``running``, ``calls``, ``restarts``),
        ``steps_per_second`` (denoising steps, on average since the start; None before the first) and ``limits`` always.
        Once it is loaded also ``pipeline`` (a class; None until then), ``examples`` (prompts for the demo model),
        ``makes`` ("picture", "video", "sound"), ``makes_videos``, ``takes_image``, ``takes_many_images``,
        ``takes_mask``, ``needs_image``, ``parameters`` (name -> ``default``, and where they are known ``multiple``,
        ``minimum``, ``maximum``; of ``lora`` the ``names``), and of the first replica ``layout`` (for people),
        ``rings`` (ranks: a list for each Ulysses group), ``ranks``, ``device``, ``dtype``, ``load_s``.
    """
    stats = omni.stats
    state: dict[str, Any] = {
        "object": "server.info",
        "status": omni.status,
        "model": settings.names[0],
        **{name: getattr(stats, name) for name in _COUNTS},
        "replicas": [asdict(replica) for replica in omni.replicas],
        "steps_per_second": _steps_per_second(stats),
        "limits": {
            "pixels": settings.max_pixels,
            "steps": settings.max_steps,
            "frames": settings.max_frames,
            "n": settings.max_n,
            "images": settings.max_images,
            "body_bytes": settings.max_body_bytes,
            "keep_alive_s": settings.keep_alive_s,
        },
        "pipeline": None,
    }
    try:
        ready = omni.info
    except EngineClosedError:
        return state
    capabilities = ready.capabilities
    takes_image = capabilities.argument_name("image") is not None
    return {
        **state,
        "pipeline": capabilities.name,
        "examples": list(SHAPES_PROMPTS) if settings.model == SHAPES_MODEL else [],
        "makes": capabilities.makes,
        "makes_videos": capabilities.makes_videos,
        "takes_image": takes_image,
        # A video starts from one picture: its first frame.
        "takes_many_images": takes_image and not capabilities.takes_one_image and not capabilities.makes_videos,
        "takes_mask": takes_image and capabilities.makes == "picture" and "mask_image" in capabilities.parameters,
        "needs_image": capabilities.needs_image,
        "parameters": _parameters(capabilities, settings),
        "layout": ready.layout,
        "rings": [list(ring) for ring in ready.rings],
        "ranks": ready.ranks,
        "device": ready.device,
        "dtype": ready.dtype,
        "load_s": ready.load_s,
    }


def _parameters(capabilities: PipelineCapabilities, settings: ServerSettings) -> dict[str, dict[str, Any]]:
    """The parameters that a request may set, with their defaults; None where only the pipeline knows one."""
    found: dict[str, dict[str, Any]] = {}
    for name in _FORM_FIELDS:
        taken = capabilities.argument_name(name)
        if taken is None or (name == "guidance_scale" and capabilities.ignores_guidance_scale):
            continue
        found[name] = {"default": capabilities.sampling_defaults.get(name, capabilities.parameters.get(taken))}
    for name, multiple in (("width", capabilities.width_multiple), ("height", capabilities.height_multiple)):
        if name in found:
            found[name] |= {"multiple": multiple, "minimum": multiple}
    if "num_inference_steps" in found:
        found["num_inference_steps"] |= {"multiple": 1, "minimum": 1, "maximum": settings.max_steps}
    if capabilities.makes_videos:
        if "num_frames" in found:
            limits = {"multiple": capabilities.frames_multiple, "minimum": 1, "maximum": settings.max_frames}
            found["num_frames"] |= limits
        default = capabilities.sampling_defaults.get("fps", frames_per_second(capabilities, {}, None))
        found["fps"] = {"default": default, "minimum": 0.1}
    elif capabilities.makes == "picture":
        # What POST /v1/images takes and POST /v1/videos does not.
        if capabilities.argument_name("num_outputs_per_prompt") is not None:
            found["n"] = {"default": 1, "multiple": 1, "minimum": 1, "maximum": settings.max_n}
        if "strength" in capabilities.parameters:
            found["strength"] = {"default": capabilities.parameters["strength"], "minimum": 0, "maximum": 1}
    if capabilities.adapters:
        found["lora"] = {"default": None, "names": list(capabilities.adapters)}
    if capabilities.argument_name("generator") is not None:
        found["seed"] = {"default": None, "multiple": 1, "minimum": 0, "maximum": MAX_SEED}
    return found


def _steps_per_second(stats: EngineStats) -> float | None:
    return stats.steps_done / stats.denoise_s if stats.denoise_s > 0 else None


@cache
def page() -> tuple[str, str]:
    """The page with its style and scripts inline, and its policy: no other script or style, no other address."""
    folder = files("omni_sp.server").joinpath("web")
    text, style, *scripts = (folder.joinpath(name).read_text("utf-8") for name in ("page.html", "page.css", *_SCRIPTS))
    text = text.replace("<style></style>", f"<style>\n{style}</style>", 1)
    text = text.replace("<script></script>", f"<script>\n{''.join(scripts)}</script>", 1)
    return text, content_security_policy(text)


def content_security_policy(text: str) -> str:
    """A Content-Security-Policy that lets through the inline style and script of this page, by their hashes."""
    inline: Mapping[str, list[str]] = {"style": [], "script": []}
    for kind, inside in _INLINE.findall(text):
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        inline[kind].append(f"'sha256-{digest}'")
    allowed = f"script-src {' '.join(inline['script'])}; style-src {' '.join(inline['style'])}"
    return f"default-src 'none'; {allowed}; {_POLICY}"
