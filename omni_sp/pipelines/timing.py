"""The stages of a pipeline call: how long they take, what they give, and how far the denoising is, for any pipeline."""

from __future__ import annotations

import functools
import time
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch

from omni_sp.pipelines.schedulers import step_function

OnStep = Callable[[int, int], None]
"""Called with (steps done, steps in all) when denoising starts and after every step."""
OnOutput = Callable[[str, Any], None]
"""Called with the name of a stage for people and what it has given."""
OnLatent = Callable[[torch.Tensor], None]
"""Called with the latent of the pipeline's own scheduler after each of its steps."""
TEXT = "the text encoder's output"
# Methods whose output is passed on -> its name for people.
_OUTPUTS = {"encode_prompt": TEXT, "forward": TEXT, "decode": "what the VAE decoded"}


class StageClock:
    """Times one call of a pipeline, stage by stage, and passes on what stages give, while the block lasts.

    Instance attributes of the pipeline and its components are replaced for that long: ``progress_bar`` (every diffusers
    pipeline steps it in its denoising loop), ``encode_prompt`` (or, where there is none, the text encoders' forward),
    the VAE's ``encode`` and ``decode``, and the schedulers' ``step``. No class is changed, and leaving the block
    restores every attribute.
    A CUDA device is synchronised at the borders of stages, and nowhere else, so that timing costs nothing.

    Attributes:
        seconds: "text_encoder", "denoise" and "vae" -> seconds.
        denoising_began: whether the pipeline has accepted its arguments and entered its denoising loop.
        has_stepped: whether a scheduler has made a step.
    """

    def __init__(
        self,
        pipe: Any,
        device: torch.device,
        on_step: OnStep | None = None,
        *,
        on_output: OnOutput | None = None,
        on_latent: OnLatent | None = None,
    ) -> None:
        self._pipe, self._device = pipe, device
        self._on_step = on_step or (lambda done, total: None)
        self._on_output = on_output or (lambda stage, output: None)
        self._on_latent = on_latent or (lambda latent: None)
        self._undo = ExitStack()
        self._inside: set[str] = set()
        self.seconds = {"text_encoder": 0.0, "denoise": 0.0, "vae": 0.0}
        self.num_steps = 0
        self.denoising_began = self.has_stepped = False

    def __enter__(self) -> StageClock:
        if callable(getattr(self._pipe, "encode_prompt", None)):
            self._time_method(self._pipe, "encode_prompt", "text_encoder")
        else:
            for name, component in getattr(self._pipe, "components", {}).items():
                if name.startswith("text_encoder") and isinstance(component, torch.nn.Module):
                    self._time_method(component, "forward", "text_encoder")
        vae = getattr(self._pipe, "vae", None)
        for method in ("encode", "decode"):
            if callable(getattr(vae, method, None)):
                self._time_method(vae, method, "vae")
        for component in getattr(self._pipe, "components", {}).values():
            if callable(getattr(component, "step", None)) and not isinstance(component, torch.nn.Module):
                self._watch_steps(component)
        self._replace(self._pipe, "progress_bar", self._steps)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def now(self) -> float:
        """Return the seconds of a steady clock, once the device has finished all its work."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _time_method(self, owner: Any, method: str, stage: str) -> None:
        """Add the seconds of a method to a stage. A stage that is entered within itself is counted once."""
        original = getattr(owner, method)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if stage in self._inside:
                return original(*args, **kwargs)
            self._inside.add(stage)
            began = self.now()
            try:
                output = original(*args, **kwargs)
                if method in _OUTPUTS:
                    self._on_output(_OUTPUTS[method], output)
                return output
            finally:
                self._inside.discard(stage)
                self.seconds[stage] += self.now() - began

        self._replace(owner, method, timed)

    def _watch_steps(self, scheduler: Any) -> None:
        """Pass on the latents that a scheduler makes, and those of copies that the pipeline makes of it."""
        original = step_function(scheduler)

        @functools.wraps(original)  # pipelines look into the signature for what step() takes
        def step(this: Any, *args: Any, **kwargs: Any) -> Any:
            self.has_stepped = True
            output = original(this, *args, **kwargs)
            latent = output[0] if isinstance(output, tuple) else getattr(output, "prev_sample", None)
            self._on_output(f"the latents after step {self.num_steps + 1}", latent)
            if this is getattr(self._pipe, "scheduler", None) and isinstance(latent, torch.Tensor):
                self._on_latent(latent)
            return output

        # A method, and no function: a deep copy of the scheduler then steps itself.
        self._replace(scheduler, "step", types.MethodType(step, scheduler))

    def _report(self, done: int, total: int) -> None:
        """Call on_step. What that runs of the pipeline, such as a preview, is no stage of the call."""
        inside, self._inside = self._inside, set(self.seconds)
        try:
            self._on_step(done, total)
        finally:
            self._inside = inside

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute on this instance until the block ends."""
        if name in vars(owner):
            self._undo.callback(setattr, owner, name, vars(owner)[name])
        else:
            self._undo.callback(delattr, owner, name)
        setattr(owner, name, value)

    def _steps(self, iterable: Any = None, total: int | None = None) -> _StepBar:
        """Stand in for DiffusionPipeline.progress_bar."""
        self.denoising_began = True
        if total is None:
            total = len(iterable) if hasattr(iterable, "__len__") else 0
        return _StepBar(self, iterable, total, self._report)


class _StepBar:
    """What pipelines use of tqdm's bar: update(), iteration and ``with``. The denoise stage lasts while it is open."""

    def __init__(self, clock: StageClock, iterable: Any, total: int, on_step: OnStep) -> None:
        self._clock, self._iterable, self._on_step = clock, iterable, on_step
        self._began: float | None = clock.now()
        self.total = total
        self.n = 0
        on_step(0, total)

    def update(self, n: int = 1) -> None:
        """Count further steps."""
        self.n += n
        self._clock.num_steps += n
        self._on_step(self.n, self.total)
        if self.n >= self.total:
            self.close()

    def close(self) -> None:
        """End the stage. A second call does nothing."""
        if self._began is not None:
            self._clock.seconds["denoise"] += self._clock.now() - self._began
            self._began = None

    def __enter__(self) -> _StepBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            yield item
            self.update()
        self.close()

    def set_description(self, *_: Any, **__: Any) -> None:
        """Do nothing: there is no bar whose caption could be set."""

    set_postfix = set_postfix_str = set_description_str = refresh = set_description
