"""The commands of ``omni-sp``, one function each. A command returns its exit code, or raises an OmniSPError."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from omni_sp.cli.options import (
    CHECK,
    DEGREES,
    ENGINE,
    GENERATE,
    PARAMS,
    SERVE,
    SERVER,
    arguments_for,
    sampling_params,
    with_cfg_scale,
)
from omni_sp.command_line import FAILED
from omni_sp.config import DiffusionParallelConfig, OmniDiffusionSamplingParams
from omni_sp.engine.startup import StartupDisplay, format_seconds, is_terminal
from omni_sp.errors import ConfigError, SamplingParamsError
from omni_sp.files import OutputFiles, read_picture
from omni_sp.pipelines.arguments import Prompt
from omni_sp.server.settings import ServerSettings

if TYPE_CHECKING:
    from omni_sp.omni import Omni
    from omni_sp.outputs import OmniRequestOutput

EXACT, AMPLIFIED = 1e-5, 1e-3
"""Relative differences in float32: of one transformer call, and of what later steps and the VAE may make of it."""


def generate(options: argparse.Namespace) -> int:
    """Draw what the pipeline makes, and write it to files: ``omni-sp generate``."""
    if options.needs_image and not options.image:
        raise SamplingParamsError("no picture to start from: give --image PATH")
    if not options.prompt and not options.image:
        raise SamplingParamsError('no prompt: give at least one --prompt "..."')
    config = DiffusionParallelConfig(**arguments_for(DEGREES, GENERATE, options))
    params = sampling_params(options)
    pictures = [read_picture(path) for path in options.image]
    files = OutputFiles(options.output, num_outputs=max(len(options.prompt), 1) * (params.num_outputs_per_prompt or 1))
    options.saved = files.saved
    # After everything that can be refused without them.
    from omni_sp.omni import Omni
    from omni_sp.pipelines.images import input_image

    with Omni(options.model, config, **arguments_for(ENGINE, GENERATE, options)) as omni:
        capabilities = omni.info.capabilities
        files.expect(capabilities)
        if options.cfg_scale is not None:
            params = with_cfg_scale(
                params, options.cfg_scale, is_true=capabilities.argument_name("true_cfg_scale") is not None
            )
        image = input_image(pictures, capabilities)
        outputs = omni.generate_each([Prompt(text=text, image=image) for text in options.prompt or [None]], params)
        if omni.is_main:
            _print_layout(omni, options.model)
        for output in outputs:
            if omni.is_main:
                _print_times(output)
                for line in files.save(output):
                    print(line, flush=True)
    return 0


def check(options: argparse.Namespace) -> int:
    """Run a model on one rank and on many, and print how far apart they are: ``omni-sp check``."""
    config = DiffusionParallelConfig(**arguments_for(DEGREES, CHECK, options))
    if config.world_size == 1:
        raise ConfigError("nothing to check on one rank: give --ulysses-degree or --ring-degree above 1")
    params = OmniDiffusionSamplingParams(**arguments_for(PARAMS, CHECK, options))
    pictures = [read_picture(path) for path in options.image]
    from omni_sp.omni import Omni
    from omni_sp.pipelines.images import input_image

    with Omni(options.model, config, **arguments_for(ENGINE, CHECK, options)) as omni:
        image = input_image(pictures, omni.info.capabilities)
        report = omni.check_report(Prompt(text=options.prompt, image=image), params)
        if not omni.is_main:
            return 0
        _print_layout(omni, options.model)
    errors = report.errors
    print("stage, and its largest difference from one process, relative to its largest number")
    for stage, error in errors.items():
        print(f"  {stage:28}{error:.1e}")
    print("gathered:", ", ".join(f"{name} ({count}x)" for name, count in report.gathers.items()) or "none")
    if options.dtype != "float32":
        print(f"{options.dtype} rounds differently in every order of additions; check in float32 to tell what is exact")
        return 0
    first_calls = [error for stage, error in errors.items() if stage.endswith("call 1")]
    if first_calls and max(first_calls) <= EXACT and max(errors.values()) <= AMPLIFIED:
        print("exact: what is left is the rounding of float32")
        return 0
    print("NOT exact: please report it, with the model's name and this table")
    return FAILED


def models(options: argparse.Namespace) -> int:
    """List every transformer class of the installed diffusers: ``omni-sp models``."""
    from omni_sp.sharding.catalogue import as_markdown, catalogue

    states = catalogue()
    if options.markdown:
        print(as_markdown(states), end="")
        return 0
    for state in states:
        print(f"{state.name:44}{state.state:10}{state.how:10}{state.note}".rstrip())
    counts = [f"{sum(one.state == name for one in states)} {name}" for name in ("exact", "unproven")]
    print(f"{len(states)} classes: {', '.join(counts)}")
    return 0


def serve(options: argparse.Namespace) -> int:
    """Serve over HTTP until SIGTERM or Ctrl-C: ``omni-sp serve``."""
    try:  # here alone: no other command waits for a web framework, or needs one
        from omni_sp.server import process
    except ModuleNotFoundError as error:
        raise ConfigError(f"serving needs {error.name}: pip install 'omni-sp[serve]'") from error
    from omni_sp.async_omni import AsyncOmni

    settings = ServerSettings(**arguments_for(SERVER, SERVE, options))
    omni = AsyncOmni(
        options.model,
        DiffusionParallelConfig(**arguments_for(DEGREES, SERVE, options)),
        max_queue_length=settings.max_queue_length,
        on_news=StartupDisplay().show,
        **arguments_for(ENGINE, SERVE, options),
    )
    return process.serve(omni, settings)


def serve_llm(options: argparse.Namespace) -> int:
    """Become vLLM's own command, which reads its flags itself: ``omni-sp serve-llm``."""
    from omni_sp.llm.vllm.serve import serve_llm

    return serve_llm(options.words)


def _print_layout(omni: Omni, model: str) -> None:
    info = omni.info
    start = "" if is_terminal() else f"start   {format_seconds(info.start_s)}\n"  # a terminal has just shown it
    print(f"model   {model}: {info.capabilities.name}, {info.dtype} on {info.device}")
    print(f"{start}layout  {info.layout}", flush=True)


def _print_times(output: OmniRequestOutput) -> None:
    took = output.metrics
    tokens = " + ".join(f"{count} {name}" for name, count in took["tokens"].items())
    print(
        f"times   {took['total_s']:.2f} s: text encoder {took['text_encoder_s']:.2f} s, "
        f"{took['num_steps']} steps of {took['denoise_step_s']:.3f} s, VAE {took['vae_s']:.2f} s"
    )
    print(f"tokens  {tokens or 'not counted'}; seed {took['seed']}")
