"""Omni: from a model's name, the degrees and prompts to pictures, videos or sounds."""

from __future__ import annotations

import itertools
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from omni_sp.config import DiffusionParallelConfig, OmniDiffusionSamplingParams
from omni_sp.engine.engine import Engine, open_engine
from omni_sp.engine.interrupts import DeferredInterrupt
from omni_sp.engine.launchers import RAY, check_launcher, for_other_machines, launchers_for, ray_launchers
from omni_sp.engine.messages import Call, Done, OnProgress, Ready
from omni_sp.engine.ranks.torchrun import inside_distributed_program
from omni_sp.engine.replicated import ReplicatedEngine
from omni_sp.engine.startup import StartupDisplay, StartupMessage, is_terminal
from omni_sp.engine.steps_display import StepsDisplay
from omni_sp.errors import RankFailedError
from omni_sp.outputs import CheckReport, OmniRequestOutput
from omni_sp.pipelines.arguments import Prompt, call_arguments, rounded_size, small_arguments
from omni_sp.pipelines.results import require_finite
from omni_sp.requests import (
    Model,
    NotCopied,
    PromptInput,
    engine_options,
    output_of,
    parse_prompt,
    prompt_list,
    require_known,
    require_params,
    with_degrees,
)

if TYPE_CHECKING:
    from typing_extensions import Never  # typing has it from Python 3.11 on


class Omni(NotCopied):
    """A diffusers pipeline, spread over ranks, ready for prompts.

    With degrees 1 × 1 the pipeline runs in this process, one call at a time, whichever thread makes it: torch has one
    global generator for all. Otherwise rank processes are started; inside a program that is already distributed
    (torchrun), its ranks are joined instead, and each of them makes the same calls and gets the same outputs.
    ``close()``, the end of a ``with`` block, an abandoned object and the end of the program leave no process.

    Args:
        model: a hub id, a folder that a diffusers pipeline was saved to, a .safetensors or .gguf file (its path, or
            OWNER/REPOSITORY/FILE on the hub), or "omni-sp/shapes", the embedded demo model.
        parallel_config: the degrees; None for one rank. "auto" lets the planner choose them for the GPUs, or the cores
            of the CPU, that are there, or for the ranks of the program around, where rank 0 chooses for all; "auto:4"
            is for 4 ranks. A line on stderr says what was chosen, and why. With ``data_parallel_size`` above 1 there
            are as many engines, each with its own ranks, which share the prompts of a call; not in a program that is
            distributed already.
        device: "cpu"; "cuda" for one GPU per rank; "cuda:N" to let all ranks share that GPU (exact, for trying out);
            None for "cuda" where there is a GPU, else "cpu".
        dtype: "float32", "bfloat16", "float16" or the torch dtype; None for bfloat16 on CUDA and float32 on the CPU.
        single_file_config: of a model that is one file, the folder or hub id of the pipeline that it belongs to, from
            which comes what the file lacks; None where diffusers can tell it by the file.
        attention_backend: name of the attention kernel, "auto", or "tune" to time them for each shape.
        attention_strategy: "omni_sp", or "yunchang" to have that library carry out the attention, for comparing; it
            refuses most shapes.
        replay: blocks of a transformer are followed once and then replayed, which is the same and quicker.
        compile: what is replayed is compiled by torch.compile, once for each kind of block and each shape; a text is a
            mode of it, such as "max-autotune-no-cudagraphs". The first picture takes minutes, the others are quicker.
        cuda_graphs: on GPUs, forwards whose blocks are all replayed are captured as CUDA graphs, one for each shape.
        quantization: "int8" or "fp8": the weights of transformers' linear layers are kept in 8 bits (by torchao), and
            are in ``dtype`` again where they are used. Needs torchao. Weights that were quantised when they were saved
            (bitsandbytes, torchao, GGUF) are taken as they are, without it.
        offload: what does not run waits on the CPU, by diffusers' own hooks: "model", one part of the pipeline after
            the other is on the device; "group", one layer after the other, which needs least memory and most time.
        vae_dtype: the dtype of the VAE, such as "float32"; None for ``dtype``.
        lora: LoRA adapters by name, each a folder, a file or a hub id, which requests may name: they are read at the
            start, and no weight of the model changes when a request puts them on. Needs peft.
        rank_timeout_s: the longest silence of ranks during a call, in seconds, before they count as failed. One
            denoising step, or one pass of the VAE, must fit into it.
        startup_timeout_s: the longest silence of ranks while they load the model, in seconds.
        launcher: what starts the ranks: "spawn", on this machine; "torchrun", which has started them; "ray", on a Ray
            cluster (one that the program is connected to, or that ``RAY_ADDRESS`` or this machine has; needs the extra
            ``ray``); None for torchrun's ranks inside such a job, and else for this machine.
        nodes: with launcher="ray", how many nodes share the ranks equally; None for as few as can be. The ranks of a
            Ulysses group are on one node either way.
        show_progress: on stderr, a bar over the parts of the start, how long each took, and a bar over the denoising
            steps; None for where stderr is a terminal.
        unknown: none: any other keyword is an error that names the nearest option.

    Raises:
        ConfigError: an option that cannot be, an unknown one, or fewer GPUs than ranks; Ray is not installed, or its
            cluster is not there or too small.
        ModelNotFoundError: no such model, or no diffusers pipeline.
        UnsupportedModelError: a transformer whose token streams cannot be found, on several ranks.
        RankFailedError: a rank failed while starting.
    """

    def __init__(
        self,
        model: Model,
        parallel_config: DiffusionParallelConfig | str | None = None,
        *,
        device: str | None = None,
        dtype: Any = None,
        single_file_config: Model | None = None,
        attention_backend: str = "auto",
        attention_strategy: str = "omni_sp",
        replay: bool = True,
        compile: bool | str = False,
        cuda_graphs: bool = False,
        quantization: str | None = None,
        offload: str | None = None,
        vae_dtype: Any = None,
        lora: Mapping[str, Model] | None = None,
        rank_timeout_s: float = 600.0,
        startup_timeout_s: float = 3600.0,
        launcher: str | None = None,
        nodes: int | None = None,
        show_progress: bool | None = None,
        **unknown: Never,
    ) -> None:
        require_known(unknown, Omni)
        check_launcher(launcher, nodes, parallel_config)
        self._launcher, self._nodes = launcher, nodes
        self._show_progress = is_terminal() if show_progress is None else show_progress
        options = engine_options(
            model,
            parallel_config,
            device=device,
            dtype=dtype,
            single_file_config=single_file_config,
            attention_backend=attention_backend,
            attention_strategy=attention_strategy,
            replay=replay,
            compile=compile,
            cuda_graphs=cuda_graphs,
            quantization=quantization,
            offload=offload,
            vae_dtype=vae_dtype,
            lora=lora,
            rank_timeout_s=rank_timeout_s,
            startup_timeout_s=startup_timeout_s,
        )
        self._options = with_degrees(options, parallel_config, _print_line if show_progress is not False else _ignore)
        if inside_distributed_program():
            self._options.config.require_one_replica()
        if launcher == RAY:
            self._options = for_other_machines(self._options)
        self._numbers = itertools.count()
        self._opening = threading.Lock()
        self._engine: Engine | ReplicatedEngine = self._open_engine()

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
                ``image`` (a PIL picture or a list of them: what to edit, or a video's first frame). Pictures are turned
                upright and converted to 8 bits, as files are. In place of a text it may hold ``prompt_embeds`` and
                ``negative_prompt_embeds`` with what the pipeline takes beside them (masks, pooled embeddings), and
                ``latents``, the noise to start from: tensors of torch.
            sampling_params: for all prompts alike; what is None is the model's own default.

        Returns:
            One output for each prompt, in their order.

        Raises:
            SamplingParamsError: no prompts, or something that the pipeline cannot take. Nothing has run then, except
                where only the pipeline itself could tell.
            NonFiniteResultError: the result holds NaN or infinite numbers; this Omni stays open.
            CallFailedError: all ranks raised the same error; the model stays loaded.
            RankFailedError: a rank raised by itself or died. Ranks that this Omni started are started again at the
                next call; in a joined program it is closed.
            EngineClosedError: it had been closed before.
            KeyboardInterrupt: Ctrl-C. Several ranks leave the call at the next step, and the model stays loaded; a
                second Ctrl-C ends them at once.
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
            NonFiniteResultError: the result holds NaN or infinite numbers.
            RankFailedError: a rank raised or died, as for generate().
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
        self,
        prompt: PromptInput = "a red circle on a blue background",
        sampling_params: OmniDiffusionSamplingParams | None = None,
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
            RankFailedError: a rank raised or died, as for generate().
            EngineClosedError: it had been closed before.
        """
        return dict(self.check_report(prompt, sampling_params).errors)

    def check_report(
        self,
        prompt: PromptInput = "a red circle on a blue background",
        sampling_params: OmniDiffusionSamplingParams | None = None,
    ) -> CheckReport:
        """Run check(), and count which operations of the model needed a full tensor on the way.

        Args:
            prompt: what check() takes.
            sampling_params: what check() takes.
        """
        capabilities = self._engine.ready.capabilities
        params = require_params(sampling_params)
        arguments = small_arguments(capabilities, call_arguments(capabilities, parse_prompt(prompt), params), params)
        call = Call(
            request_id="check",
            arguments=arguments,
            seeds=params.seeds or (0,),
            scheduler=params.scheduler,
            adapters=params.adapters,
            check="ranks",
        )
        done = self._run(self._live_engine(), call)
        return CheckReport(errors=done.errors, gathers=done.gathers, blocks=done.blocks)

    def close(self) -> None:
        """End the rank processes and give memory back. Idempotent."""
        self._engine.close()

    def __enter__(self) -> Omni:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_engine(self) -> Engine | ReplicatedEngine:
        began, screen = time.perf_counter(), StartupDisplay(self._show_progress)
        is_starting = True

        def on_news(news: str) -> None:
            if is_starting or not isinstance(news, StartupMessage):  # a replica's ranks may start again at any time
                screen.show(news)

        engine: Engine | ReplicatedEngine
        try:
            if self._options.config.data_parallel_size > 1:
                launchers, _ = launchers_for(self._options, self._launcher, self._nodes)
                engine = ReplicatedEngine(self._options, launchers, on_news)
                self._startup_s = time.perf_counter() - began
                return engine
            [launcher] = ray_launchers(self._options, self._nodes) if self._launcher == RAY else [None]
            engine = open_engine(self._options, on_news, launcher)
            engine.start.finish()
        finally:
            is_starting = False
            screen.close()
        self._startup_s = time.perf_counter() - began
        return engine

    def _live_engine(self) -> Engine | ReplicatedEngine:
        """The engine for the next call: where a failure has ended its ranks, a new one."""
        with self._opening:
            with suppress(RankFailedError):  # a rank has ended between two calls
                self._engine.require_alive()
            if self._engine.can_start_again:
                self._engine = self._open_engine()
            return self._engine

    def _run(self, engine: Engine | ReplicatedEngine, call: Call, on_progress: OnProgress | None = None) -> Done:
        if self._options.config.num_processes == 1:
            return engine.run(call, on_progress)
        with DeferredInterrupt(self._show_progress and engine.is_main) as is_interrupted:
            return engine.run(replace(call, can_be_aborted=True), on_progress, is_interrupted)

    def _run_each(
        self, requests: list[tuple[Prompt, dict[str, Any]]], params: OmniDiffusionSamplingParams
    ) -> Iterator[OmniRequestOutput]:
        if isinstance(engine := self._live_engine(), ReplicatedEngine):
            yield from self._run_on_replicas(engine, requests, params)
            return
        for number, (prompt, arguments) in enumerate(requests, start=1):
            engine = self._live_engine()
            call = self._call(engine, arguments, params)
            with StepsDisplay(self._show_progress and engine.is_main, number, len(requests)) as screen:
                try:
                    done = self._run(engine, call, lambda news: screen.show(news.done, news.total, news.note))
                except RankFailedError as error:
                    # A rank that died while nothing ran may be heard of only now: this call is not the cause.
                    if error.kind != "died" or screen.has_shown or not engine.can_start_again:
                        raise
                    engine = self._live_engine()
                    done = self._run(engine, call, lambda news: screen.show(news.done, news.total, news.note))
            require_finite(done.result, engine.ready.capabilities, engine.ready.dtype)
            yield output_of(engine.ready, call, prompt, params, done, startup_s=self._startup_s)

    def _run_on_replicas(
        self,
        engine: ReplicatedEngine,
        requests: list[tuple[Prompt, dict[str, Any]]],
        params: OmniDiffusionSamplingParams,
    ) -> Iterator[OmniRequestOutput]:
        """All prompts are in the queue of the replicas at once; the outputs come in the order of the prompts."""
        calls = [replace(self._call(engine, arguments, params), can_be_aborted=True) for _prompt, arguments in requests]
        interrupt: DeferredInterrupt | None = None
        running = engine.run_each(calls, None, lambda: interrupt is not None and interrupt())
        with StepsDisplay(self._show_progress, 1, 1, caption="prompts", unit="prompt") as screen, closing(running):
            screen.show(0, len(calls))
            for number, ((prompt, _arguments), call) in enumerate(zip(requests, calls, strict=True), start=1):
                with DeferredInterrupt(self._show_progress) as interrupt:
                    done = next(running)
                interrupt = None
                screen.show(number, len(calls))
                yield output_of(engine.ready, call, prompt, params, done, startup_s=self._startup_s)

    def _call(
        self, engine: Engine | ReplicatedEngine, arguments: dict[str, Any], params: OmniDiffusionSamplingParams
    ) -> Call:
        return Call(
            request_id=f"request-{next(self._numbers)}",
            arguments=arguments,
            seeds=params.seeds or (engine.new_seed(),),
            scheduler=params.scheduler,
            adapters=params.adapters,
        )


def _print_line(line: str) -> None:
    print(f"omni-sp: {line}", file=sys.stderr, flush=True)


def _ignore(line: str) -> None:
    """Whoever wants no progress on the screen wants no choices there either."""
