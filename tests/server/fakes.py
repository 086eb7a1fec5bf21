"""FakeOmni: AsyncOmni's interface with scripted steps, previews and results, and no rank process behind it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import pickle
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from omni_sp.async_omni import AsyncOmni, ReplicaStats
from omni_sp.config import OmniDiffusionSamplingParams
from omni_sp.engine.jobs import EngineStats
from omni_sp.engine.messages import Ready
from omni_sp.errors import (
    EngineClosedError,
    OmniSPError,
    QueueFullError,
    RequestAbortedError,
    SamplingParamsError,
)
from omni_sp.events import RequestDone, RequestEvent, RequestFailed, RequestProgress, RequestQueued
from omni_sp.outputs import OmniRequestOutput
from omni_sp.pipelines.arguments import Prompt, call_arguments, frames_per_second
from omni_sp.pipelines.capabilities import PipelineCapabilities
from omni_sp.pipelines.metadata import drawing_settings
from omni_sp.requests import PromptInput, parse_prompt, require_params

_COMMON: dict[str, Any] = {
    "prompt": None, "negative_prompt": None, "height": 64, "width": 96, "num_inference_steps": 4, "guidance_scale": 4.0,
    "generator": None, "output_type": "pil", "return_dict": True,
}  # fmt: skip
# Text to picture: whole multiples of 16 pixels.
PICTURES = PipelineCapabilities(
    name="FakePicturePipeline",
    parameters={**_COMMON, "num_images_per_prompt": 1},
    vae_multiple=8,
    height_multiple=16,
    width_multiple=16,
)
# Picture and text to picture; it fails without a picture, and takes several.
EDITS = replace(PICTURES, name="FakeEditPipeline", parameters={**PICTURES.parameters, "image": None}, needs_image=True)
# The same with a mask.
INPAINTS = replace(
    EDITS, name="FakeInpaintPipeline", parameters={**EDITS.parameters, "mask_image": None}, takes_one_image=True
)
# Text (and, if one likes, a first frame) to video: 1 + a multiple of 4 frames.
VIDEOS = PipelineCapabilities(
    name="FakeVideoPipeline",
    parameters={**_COMMON, "num_frames": 9, "num_videos_per_prompt": 1, "image": None},
    makes_videos=True,
    takes_one_image=True,
    vae_multiple=8,
    height_multiple=16,
    width_multiple=16,
    frames_multiple=4,
)
_POLL_S = 0.002


@dataclass
class FakeRequest:
    """One request that a FakeOmni was asked for; kept in ``FakeOmni.requests`` in the order of arrival.

    Attributes:
        arguments: what the pipeline would have been called with; pickled once it runs, as for rank processes.
        outcome: "waiting", "running", "done", "failed" or "aborted".
    """

    id: str
    prompt: Prompt
    params: OmniDiffusionSamplingParams
    arguments: dict[str, Any]
    priority: int
    previews: bool
    number: int
    outcome: str = "waiting"
    is_aborted: bool = False
    error: OmniSPError | None = None

    @property
    def is_over(self) -> bool:
        return self.outcome in ("done", "failed", "aborted")


class FakeOmni(AsyncOmni):
    """An AsyncOmni without ranks: it checks requests as the real one does and "draws" pictures of one colour.

    One request runs at a time; others wait, in the order of priority and arrival. Safe to steer from the test's thread.

    Args:
        capabilities: of the pipeline that it pretends to be: PICTURES, EDITS, INPAINTS, VIDEOS.
        steps: denoising steps where a request says nothing. step_s: seconds of each.
        start_s: seconds that start() takes. start_error: what start() raises then. start_on: what it waits for besides.
        errors: of the first, second, … request, after its first step; None for a good one, and for all further ones.
        hold_at: done steps after which every request waits for ``go_on.set()``.
        max_queue_length: requests that may wait.
        dropped: tokens that every prompt loses, by tokenizer.

    Attributes:
        requests: all so far. go_on: see hold_at. restarts, force_status, force_replicas: set them to
            pretend ("restarting").
    """

    def __init__(
        self,
        *,
        capabilities: PipelineCapabilities = PICTURES,
        steps: int = 4,
        step_s: float = 0.0,
        start_s: float = 0.0,
        start_error: OmniSPError | None = None,
        start_on: threading.Event | None = None,
        errors: Sequence[OmniSPError | None] = (),
        hold_at: int | None = None,
        max_queue_length: int | None = None,
        dropped: Mapping[str, int] | None = None,
    ) -> None:
        self.requests: list[FakeRequest] = []
        self.go_on = threading.Event()
        self.force_status: str | None = None
        self.force_replicas: tuple[ReplicaStats, ...] = ()
        self.restarts = 0
        self._capabilities, self._steps, self._step_s, self._hold_at = capabilities, steps, step_s, hold_at
        self._start_s, self._start_error, self._errors = start_s, start_error, list(errors)
        self._most, self._start_on = max_queue_length, start_on
        self._dropped = dict(dropped or {})
        self._line: list[FakeRequest] = []
        self._is_started, self._state = False, "starting"
        self._numbers = itertools.count()
        self._num_steps = 0
        self._observers: list[Callable[[RequestEvent], None]] = []

    @property
    def status(self) -> str:
        return self.force_status or self._state

    @property
    def info(self) -> Ready:
        if not self._is_started:
            raise EngineClosedError("the model is still being loaded: try again later")
        return Ready(
            rank=0, ranks=4, layout="ulysses_degree 2 × ring_degree 2 = 4 ranks, in words of its own",
            rings=((0, 1), (2, 3)), capabilities=self._capabilities, device="cpu", dtype="float32", load_s=0.5,
        )  # fmt: skip

    @property
    def stats(self) -> EngineStats:
        outcomes = [request.outcome for request in self.requests]
        return EngineStats(
            queued=outcomes.count("waiting"),
            running=outcomes.count("running"),
            done=outcomes.count("done"),
            failed=outcomes.count("failed"),
            aborted=outcomes.count("aborted"),
            restarts=self.restarts,
            steps=self._num_steps,
            start_s={"load": 0.5, "warm_up": 0.0},
        )

    @property
    def replicas(self) -> tuple[ReplicaStats, ...]:
        return self.force_replicas or (ReplicaStats(status=self.status),)

    async def start(self) -> None:
        if self._is_started or self._state != "starting":
            return
        await asyncio.sleep(self._start_s)
        while self._start_on is not None and not self._start_on.is_set():
            await asyncio.sleep(_POLL_S)
        if self._start_error is not None:
            self._state = "failed"
            raise self._start_error
        if self._state == "starting":
            self._is_started, self._state = True, "ready"

    async def drain(self, timeout_s: float = 30.0) -> None:
        if self._state not in ("closed", "failed"):
            self._state = "draining"
        for request in self._line:
            if request.outcome == "waiting":
                request.error = EngineClosedError("the server is shutting down: try again later")
        until = time.monotonic() + timeout_s
        while self._line and time.monotonic() < until:
            await asyncio.sleep(_POLL_S)
        await self.close()

    async def close(self) -> None:
        if self._state != "failed":
            self._state = "closed"
        for request in self._line:
            request.error = request.error or EngineClosedError("AsyncOmni was closed")

    async def abort(self, request_id: str) -> bool:
        for request in self._line:
            if request.id == request_id:
                request.is_aborted = True
                return True
        return False

    async def generate(
        self,
        prompt: PromptInput,
        sampling_params: OmniDiffusionSamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        previews: bool = False,
    ) -> AsyncIterator[RequestEvent]:
        request = self._submit_fake(prompt, require_params(sampling_params), request_id, priority, previews)
        async with contextlib.aclosing(self._events(request)) as events:
            async for event in events:
                for observer in self._observers:
                    observer(event)
                yield event

    async def _events(self, request: FakeRequest) -> AsyncGenerator[RequestEvent, None]:
        try:
            position = -1
            while self._line[0] is not request:
                if self._line.index(request) != position:
                    position = self._line.index(request)
                    yield RequestQueued(request_id=request.id, position=position)
                await asyncio.sleep(_POLL_S)
                self._raise_if_over(request)
            if position < 0:
                yield RequestQueued(request_id=request.id, position=0)
            self._raise_if_over(request)
            request.outcome = "running"
            request.arguments = pickle.loads(pickle.dumps(request.arguments))
            taken_as = self._capabilities.argument_name("image")
            request.prompt = replace(request.prompt, image=request.arguments.get(taken_as or ""))
            async for event in self._run_fake(request):
                yield event
            output = self._fake_output(request)
            request.outcome = "done"
            self._line.remove(request)
            yield RequestDone(request_id=request.id, output=output)
        except OmniSPError as error:
            request.outcome = "aborted" if isinstance(error, RequestAbortedError) else "failed"
            self._line.remove(request)
            yield RequestFailed(request_id=request.id, error=error)
        finally:
            if not request.is_over:
                request.outcome = "aborted"
                self._line.remove(request)

    def _submit_fake(
        self,
        prompt: PromptInput,
        params: OmniDiffusionSamplingParams,
        request_id: str | None,
        priority: int,
        previews: bool,
    ) -> FakeRequest:
        parsed = parse_prompt(prompt)
        arguments = call_arguments(self.info.capabilities, parsed, params)
        if self.status in ("draining", "closed", "failed"):
            raise EngineClosedError(f"AsyncOmni is {self.status}")
        if self._most is not None and len(self._line) > self._most:
            raise QueueFullError(f"{self._most} requests wait already, which is the most: try again later")
        number = next(self._numbers)
        name = request_id or f"request-{number}"
        if any(one.id == name for one in self._line):
            raise SamplingParamsError(f"request_id={name!r} is in use: give another one, or none")
        request = FakeRequest(name, parsed, params, arguments, priority, previews, number)
        self.requests.append(request)
        first = 1 if self._line else 0
        self._line[first:] = sorted([*self._line[first:], request], key=lambda one: (-one.priority, one.number))
        return request

    async def _run_fake(self, request: FakeRequest) -> AsyncIterator[RequestEvent]:
        total = request.params.num_inference_steps or self._steps
        error = self._errors[request.number] if request.number < len(self._errors) else None
        yield RequestProgress(request_id=request.id, done=0, total=total)
        for done in range(total + 1):
            if done:
                await asyncio.sleep(self._step_s)
                self._num_steps += 1
                count = (request.params.num_outputs_per_prompt or 1) if request.previews else 0
                shown = tuple(Image.new("RGB", (24, 16), (10 * done % 256, place, 0)) for place in range(count))
                preview = next(iter(shown), None)
                yield RequestProgress(request_id=request.id, done=done, total=total, preview=preview, previews=shown)
            while done == self._hold_at and not self.go_on.is_set():
                self._raise_if_over(request)
                await asyncio.sleep(_POLL_S)
            self._raise_if_over(request)
            if done == min(1, total) and error is not None:
                raise error

    def _raise_if_over(self, request: FakeRequest) -> None:
        if request.is_aborted:
            raise RequestAbortedError(f"{request.id} was aborted")
        if request.error is not None:
            raise request.error

    def _fake_output(self, request: FakeRequest) -> OmniRequestOutput:
        height, width = (request.arguments.get(side) or _COMMON[side] for side in ("height", "width"))
        seed = next(iter(request.params.seeds), 12345)
        count = request.params.num_outputs_per_prompt or 1
        pictures = [
            Image.new("RGB", (width, height), ((seed + place) % 256, len(request.prompt.text or "") % 256, 200))
            for place in range(count)
        ]
        steps = request.params.num_inference_steps or self._steps
        metrics: dict[str, Any] = {
            "startup_s": 1.0, "load_s": 0.5, "text_encoder_s": 0.01, "denoise_s": 0.1 * steps, "denoise_step_s": 0.1,
            "vae_s": 0.02, "total_s": 0.03 + 0.1 * steps, "num_steps": steps, "ranks": 4, "seed": seed,
            "tokens": {"hidden_states": 24, "encoder_hidden_states": 7}, "dropped_tokens": self._dropped,
        }  # fmt: skip
        output = OmniRequestOutput(request_id=request.id, prompt=request.prompt.text or "", metrics=metrics)
        output.settings = drawing_settings(
            self._capabilities, request.arguments, model="shapes", layout="4 ranks", prompt=output.prompt, seed=seed
        )
        if self._capabilities.makes_videos:
            frames = request.params.num_frames or 9
            output.videos = [[picture.copy() for _ in range(frames)] for picture in pictures]
            metrics["fps"] = frames_per_second(self._capabilities, request.arguments, request.params.fps)
        else:
            output.images = pictures
        return output


def held(**options: Any) -> FakeOmni:
    """A FakeOmni whose requests wait after their first step until ``go_on.set()``."""
    return FakeOmni(hold_at=1, **options)


__all__ = ["EDITS", "INPAINTS", "PICTURES", "VIDEOS", "FakeOmni", "FakeRequest", "held"]
