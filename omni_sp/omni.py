"""Omni: from a model's name, the degrees and prompts to pictures, videos or sounds."""

from __future__ import annotations

import itertools
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from omni_sp.config import DiffusionParallelConfig, OmniDiffusionSamplingParams
from omni_sp.engine.engine import open_engine
from omni_sp.engine.messages import Call, Ready
from omni_sp.engine.startup import StartupDisplay, is_terminal
from omni_sp.outputs import CheckReport, OmniRequestOutput
from omni_sp.pipelines.arguments import Prompt, call_arguments, rounded_size, small_arguments
from omni_sp.requests import (
    Model,
    PromptInput,
    engine_options,
    output_of,
    parse_prompt,
    prompt_list,
    require_known,
    require_params,
)

if TYPE_CHECKING:
    from typing_extensions import Never  # typing has it from Python 3.11 on


class Omni:
    """A diffusers pipeline, spread over ranks, ready for prompts.

    With degrees 1 × 1 the pipeline runs in this process. Otherwise rank processes are started; inside a program that
    is already distributed (torchrun), its ranks are joined instead, and each of them makes the same calls and gets the
    same outputs. ``close()``, the end of a ``with`` block, an abandoned object and the end of the program leave no
    process.

    Args:
        model: a hub id, a folder that a diffusers pipeline was saved to, or "omni-sp/shapes", the embedded demo model.
        parallel_config: the degrees; None for one rank.
        device: "cpu"; "cuda" for one GPU per rank; "cuda:N" to let all ranks share that GPU (exact, for trying out);
            None for "cuda" where there is a GPU, else "cpu".
        dtype: "float32", "bfloat16", "float16" or the torch dtype; None for bfloat16 on CUDA and float32 on the CPU.
        attention_backend: name of the attention kernel, or "auto".
        attention_strategy: "omni_sp", or "yunchang" to have that library carry out the attention, for comparing; it
            refuses most shapes.
        rank_timeout_s: the longest silence of ranks during a call, in seconds, before they count as failed. One
            denoising step, or one pass of the VAE, must fit into it.
        startup_timeout_s: the longest silence of ranks while they load the model, in seconds.
        show_progress: on stderr, a bar over the parts of the start, how long each took, and a bar over the denoising
            steps; None for where stderr is a terminal.
        unknown: none: any other keyword is an error that names the nearest option.

    Raises:
        ConfigError: an option that cannot be, an unknown one, or fewer GPUs than ranks.
        ModelNotFoundError: no such model, or no diffusers pipeline.
        UnsupportedModelError: a transformer whose token streams cannot be found, on several ranks.
        RankFailedError: a rank failed while starting.
    """

    def __init__(
        self,
        model: Model,
        parallel_config: DiffusionParallelConfig | None = None,
        *,
        device: str | None = None,
        dtype: Any = None,
        attention_backend: str = "auto",
        attention_strategy: str = "omni_sp",
        rank_timeout_s: float = 600.0,
        startup_timeout_s: float = 3600.0,
        show_progress: bool | None = None,
        **unknown: Never,
    ) -> None:
        require_known(unknown, Omni)
        began = time.perf_counter()
        self._show_progress = is_terminal() if show_progress is None else show_progress
        options = engine_options(
            model,
            parallel_config,
            device=device,
            dtype=dtype,
            attention_backend=attention_backend,
            attention_strategy=attention_strategy,
            rank_timeout_s=rank_timeout_s,
            startup_timeout_s=startup_timeout_s,
        )
        screen = StartupDisplay(self._show_progress)
        try:
            self._engine = open_engine(options, screen.show)
            self._engine.start.finish()
        finally:
            screen.close()
        self._startup_s = time.perf_counter() - began
        self._numbers = itertools.count()

    @property
    def info(self) -> Ready:
        """What is loaded and where: the pipeline's ``capabilities``, the ranks' ``layout``, ``device``, ``dtype``."""
        return self._engine.ready

    @property
    def is_main(self) -> bool:
        """True in the one process that shows progress to people; False on ranks above 0 of a joined program."""
        return self._engine.is_main

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: OmniDiffusionSamplingParams | None = None,
    ) -> list[OmniRequestOutput]:
        """Draw every prompt: pictures, videos or sounds, whatever the model makes.

        Args:
            prompts: one prompt or a list of them. A prompt is a string, or a dict with ``prompt``, ``negative_prompt``,
                ``image`` (a PIL picture or a list of them: what to edit, or a video's first frame).
            sampling_params: for all prompts alike; what is None is the model's own default.

        Returns:
            One output for each prompt, in their order.

        Raises:
            SamplingParamsError: no prompts, or something that the pipeline cannot take. Nothing has run then, except
                where only the pipeline itself could tell.
            RankFailedError: a rank raised or died; this Omni is closed (with one rank in this process it stays open).
            EngineClosedError: it had been closed before.
        """
        return list(self.generate_each(prompts, sampling_params))

    def generate_each(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: OmniDiffusionSamplingParams | None = None,
    ) -> Iterator[OmniRequestOutput]:
        """Draw every prompt, and give each output as soon as it is finished. All prompts are checked first.

        Args:
            prompts: one prompt or a list of them, as for generate().
            sampling_params: for all prompts alike; what is None is the model's own default.

        Raises:
            SamplingParamsError: no prompts, or something that the pipeline cannot take.
            RankFailedError: a rank raised or died.
            EngineClosedError: it had been closed before.
        """
        params = require_params(sampling_params)
        capabilities = self._engine.ready.capabilities
        parsed = [parse_prompt(prompt) for prompt in prompt_list(prompts)]
        calls = [call_arguments(capabilities, prompt, params) for prompt in parsed]
        drawn = rounded_size(capabilities, calls[0])
        if drawn is not None:
            warnings.warn(
                f"{capabilities.name} draws whole tokens: {calls[0]['width']} x {calls[0]['height']} pixels become "
                f"{drawn[1]} x {drawn[0]}, as on one process",
                stacklevel=3,
            )
        return self._run_each(list(zip(parsed, calls, strict=True)), params)

    def check(
        self, prompt: PromptInput = "a red circle", sampling_params: OmniDiffusionSamplingParams | None = None
    ) -> dict[str, float]:
        """Run one small call on one rank alone and over all ranks: is this model exact here?

        Args:
            prompt: one prompt, as for generate().
            sampling_params: what is None is small: a size whose number of tokens few numbers of ranks divide, and two
                steps.

        Returns:
            Stage -> the largest difference on any rank, relative to the largest number of the stage in one process:
            "text" (prompt embeddings), each call of each transformer, "result" (the finished picture or video). In
            float32 an exact model stays near 1e-6 in its first call; later stages may amplify that.

        Raises:
            SamplingParamsError: something that the pipeline cannot take.
            RankFailedError: a rank raised or died.
            EngineClosedError: it had been closed before.
        """
        return dict(self.check_report(prompt, sampling_params).errors)

    def check_report(
        self, prompt: PromptInput = "a red circle", sampling_params: OmniDiffusionSamplingParams | None = None
    ) -> CheckReport:
        """Run check(), and count which operations of the model needed a full tensor on the way.

        Args:
            prompt: what check() takes.
            sampling_params: what check() takes.
        """
        capabilities = self._engine.ready.capabilities
        params = require_params(sampling_params)
        arguments = small_arguments(capabilities, call_arguments(capabilities, parse_prompt(prompt), params), params)
        seed = 0 if params.seed is None else params.seed
        call = Call(request_id="check", arguments=arguments, seeds=(seed,), check="ranks")
        done = self._engine.run(call, None)
        return CheckReport(errors=done.errors, gathers=done.gathers)

    def close(self) -> None:
        """End the rank processes and give memory back. Idempotent."""
        self._engine.close()

    def __enter__(self) -> Omni:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run_each(
        self, requests: list[tuple[Prompt, dict[str, Any]]], params: OmniDiffusionSamplingParams
    ) -> Iterator[OmniRequestOutput]:
        for number, (prompt, arguments) in enumerate(requests, start=1):
            seed = self._engine.new_seed() if params.seed is None else params.seed
            call = Call(request_id=f"request-{next(self._numbers)}", arguments=arguments, seeds=(seed,))
            with _StepsOnScreen(self._show_progress and self._engine.is_main, number, len(requests)) as screen:
                done = self._engine.run(call, lambda news: screen.show(news.done, news.total))
            yield output_of(self._engine.ready, call, prompt, params, done, startup_s=self._startup_s)


class _StepsOnScreen:
    """A bar over the denoising steps of one prompt, on stderr; or nothing."""

    def __init__(self, shown: bool, number: int, num_prompts: int) -> None:
        self._shown = shown
        self._caption = f"prompt {number}/{num_prompts}" if num_prompts > 1 else "denoising"
        self._bar: Any = None

    def show(self, done: int, total: int) -> None:
        """Draw ``done`` of ``total`` steps."""
        if not self._shown:
            return
        if self._bar is None or done < self._bar.n:
            self._end()
            self._bar = tqdm(total=total, desc=self._caption, unit="step", file=sys.stderr)
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> _StepsOnScreen:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
