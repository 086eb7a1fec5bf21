"""The commands of ``omni-sp``, one function each. A command returns its exit code, or raises an OmniSPError."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from omni_sp.cli.embedding_options import EMBEDDING, SERVE_EMBEDDINGS
from omni_sp.cli.options import (
    CHECK,
    DOCTOR,
    ENGINE,
    EXAMINATION,
    GENERATE,
    PARAMS,
    PLAN,
    PLANNER,
    SERVE,
    SERVER,
    arguments_for,
    lora_scales,
    parallel_config,
    sampling_params,
    with_cfg_scale,
)
from omni_sp.command_line import FAILED, CommandLine, close_unread
from omni_sp.config import OmniDiffusionSamplingParams
from omni_sp.engine.startup import StartupDisplay, format_seconds, is_terminal
from omni_sp.errors import ConfigError, SamplingParamsError
from omni_sp.files import OutputFiles, read_picture
from omni_sp.outputs import dropped_tokens_note
from omni_sp.pipelines.arguments import Prompt
from omni_sp.server.settings import ServerSettings

if TYPE_CHECKING:
    from omni_sp.omni import Omni
    from omni_sp.outputs import OmniRequestOutput

_SPELT_ALIKE = 0.85
EXACT, AMPLIFIED = 1e-5, 1e-3
"""Relative differences in float32: of one transformer call, and of what later steps and the VAE may make of it."""


def generate(options: argparse.Namespace) -> int:
    """Draw what the pipeline makes, and write it to files: ``omni-sp generate``."""
    if options.needs_image and not options.image:
        raise SamplingParamsError("no picture to start from: give --image PATH")
    if not options.prompt and not options.image:
        raise SamplingParamsError('no prompt: give at least one --prompt "..."')
    params = sampling_params(options)
    pictures = [read_picture(path) for path in options.image]
    num_outputs = max(len(options.prompt), 1) * (params.num_outputs_per_prompt or 1)
    files = OutputFiles(options.output, num_outputs, metadata=not options.no_metadata)
    options.saved = files.saved
    config = parallel_config(GENERATE, options, _print_note, request=_what_is_drawn(params, options.cfg_scale))
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
        image = input_image(pictures)
        outputs = omni.generate_each([Prompt(text=text, image=image) for text in options.prompt or [None]], params)
        if omni.is_main:
            _print_layout(omni, options.model, config.data_parallel_size)
        for output in outputs:
            if omni.is_main:
                _print_times(output)
                for line in files.save(output):
                    _say(line)
    return 0


def check(options: argparse.Namespace) -> int:
    """Run a model on one rank and on many, and print how far apart they are: ``omni-sp check``."""
    config = parallel_config(CHECK, options, _print_note)
    if config.world_size == 1:
        raise ConfigError(
            "nothing to check on one rank: give --ulysses-degree, --ring-degree or --cfg-parallel-size above 1"
        )
    params = OmniDiffusionSamplingParams(**arguments_for(PARAMS, CHECK, options), lora=lora_scales(options))
    pictures = [read_picture(path) for path in options.image]
    from omni_sp.omni import Omni
    from omni_sp.pipelines.images import input_image

    with Omni(options.model, config, **arguments_for(ENGINE, CHECK, options)) as omni:
        image = input_image(pictures)
        report = omni.check_report(Prompt(text=options.prompt, image=image), params)
        if not omni.is_main:
            return 0
        _print_layout(omni, options.model)
    errors = report.errors
    print("stage, and its largest difference from one process, relative to its largest number")
    for stage, error in errors.items():
        print(f"  {stage:28}{error:.1e}")
    print("gathered:", ", ".join(f"{name} ({count}x)" for name, count in report.gathers.items()) or "none")
    if report.blocks["replayed"] or report.blocks["recorded"] or report.blocks["followed"]:
        followed = "".join(f", {count} followed ({reason})" for reason, count in report.blocks["followed"].items())
        compiled = f" ({report.blocks['compiled']} compiled)" if report.blocks["compiled"] else ""
        print(f"blocks: {report.blocks['replayed']} replayed, {report.blocks['recorded']} recorded{compiled}{followed}")
    if report.blocks["in_graphs"] or report.blocks["not_in_graphs"]:
        others = "".join(f", {count} not ({reason})" for reason, count in report.blocks["not_in_graphs"].items())
        print(f"CUDA graphs: {report.blocks['in_graphs']} forwards{others}")
    if options.dtype != "float32":
        print(f"{options.dtype} rounds differently in every order of additions; check in float32 to tell what is exact")
        return 0
    first_calls = [error for stage, error in errors.items() if stage.endswith("call 1")]
    if first_calls and max(first_calls) <= EXACT and max(errors.values()) <= AMPLIFIED:
        print("exact: what is left is the rounding of float32")
        return 0
    print("NOT exact: please report it, with the model's name and this table")
    return FAILED


def info(options: argparse.Namespace) -> int:
    """Print what a picture was drawn with, as its file keeps it: ``omni-sp info``."""
    from omni_sp.pipelines.metadata import read_settings

    settings = read_settings(options.file)
    if options.json:
        print(json.dumps(settings, ensure_ascii=False))
        return 0
    for name, value in settings.items():
        # The file may be anybody's: what steers a terminal is shown, not sent.
        text = "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in str(value))
        print(f"{name:24}{text}")
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Say whether this machine is set up for ranks, measure it and prove it: ``omni-sp doctor``."""
    from omni_sp.doctor import examine
    from omni_sp.doctor.report import as_text

    arguments = arguments_for(EXAMINATION, DOCTOR, options)
    with tqdm(
        bar_format="examining {percentage:3.0f}%|{bar:20}| {desc}", leave=False, disable=not is_terminal()
    ) as bar:

        def on_step(text: str, done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.set_description_str(text)

        report = examine(on_step=on_step, **arguments)
    print(json.dumps(report.as_dict(), ensure_ascii=False) if options.json else as_text(report))
    return FAILED if report.num_errors else 0


def models(options: argparse.Namespace) -> int:
    """List every transformer class of the installed diffusers: ``omni-sp models``."""
    from omni_sp.sharding.catalogue import as_markdown, catalogue

    states = catalogue()
    if options.markdown:
        print(as_markdown(states), end="")
        return 0
    for state in states:
        print(f"{state.name:44}{state.state:10}{state.note}".rstrip())
    counts = [f"{sum(one.state == name for one in states)} {name}" for name in ("exact", "unproven")]
    print(f"{len(states)} classes: {', '.join(counts)}")
    return 0


def plan(options: argparse.Namespace) -> int:
    """Say which degrees pay for a model on given devices: ``omni-sp plan``."""
    from omni_sp.planner import machine
    from omni_sp.planner import plan as planned
    from omni_sp.planner.machines import HERE, num_devices_here
    from omni_sp.planner.report import as_svg, as_text
    from omni_sp.planner.search import ALL

    arguments = arguments_for(PLANNER, PLAN, options)
    if options.here:
        arguments["gpu"] = HERE
    if options.plot and not options.plot.parent.is_dir():
        raise ConfigError(f"--plot {options.plot}: there is no folder {options.plot.parent}")
    on = machine(arguments.pop("gpu"), **({"link": options.link} if options.link else {}))
    arguments.setdefault("gpus", num_devices_here() if options.here else 1)
    found = planned(options.model, gpu=on, consider=ALL if options.consider_all else None, **arguments)
    if options.plot:
        options.plot.write_text(as_svg(found))
    print(json.dumps(found.as_dict()) if options.json else as_text(found))
    return 0


def serve(options: argparse.Namespace) -> int:
    """Serve over HTTP until SIGTERM or Ctrl-C: ``omni-sp serve``."""
    try:  # here alone: no other command waits for a web framework, or needs one
        from omni_sp.server import process
    except ModuleNotFoundError as error:
        raise ConfigError(f"serving needs {error.name}: pip install '.[serve]'") from error
    from omni_sp.async_omni import AsyncOmni

    settings = ServerSettings(**arguments_for(SERVER, SERVE, options))
    on_news = StartupDisplay().show if settings.log_format == "text" else process.log_news
    omni = AsyncOmni(
        options.model,
        parallel_config(SERVE, options, on_news, joins=False),
        max_queue_length=settings.max_queue_length,
        on_news=on_news,
        **arguments_for(ENGINE, SERVE, options),
    )
    return process.serve(omni, settings)


def serve_embeddings(options: argparse.Namespace) -> int:
    """Serve embeddings over HTTP until SIGTERM or Ctrl-C: ``omni-sp serve-embeddings``."""
    if options.words[1:2] != [options.model]:
        raise ConfigError("give the model first: omni-sp serve-embeddings MODEL [options] [options of vllm serve]")
    known = [flag for option in SERVE_EMBEDDINGS for flag in option.flags]
    for flag in CommandLine(options.passed_on).flags():
        near = difflib.get_close_matches(flag, known, n=1, cutoff=_SPELT_ALIKE)
        if near:
            raise ConfigError(f"no option {flag}; did you mean {near[0]}?")
    try:
        from omni_sp.server.embedding import process
    except ModuleNotFoundError as error:
        raise ConfigError(f"serving needs {error.name}: pip install '.[serve]'") from error
    from omni_sp.llm.embedding.settings import EmbeddingSettings

    settings = ServerSettings(model=options.model, **arguments_for(SERVER, SERVE_EMBEDDINGS, options))
    embedding = EmbeddingSettings(
        **arguments_for(EMBEDDING, SERVE_EMBEDDINGS, options), vllm_arguments=tuple(options.passed_on)
    )
    return process.serve_embeddings(embedding, settings)


def serve_llm(options: argparse.Namespace) -> int:
    """Become vLLM's own command, which reads its flags itself: ``omni-sp serve-llm``."""
    from omni_sp.llm.vllm.serve import serve_llm

    return serve_llm(options.words)


def _print_note(line: str) -> None:
    print(f"omni-sp: {line}", file=sys.stderr, flush=True)


def _what_is_drawn(params: OmniDiffusionSamplingParams, cfg_scale: float | None) -> dict[str, Any]:
    """What of a request the planner looks at."""
    scale = cfg_scale if cfg_scale is not None else params.true_cfg_scale
    return {
        "height": params.height,
        "width": params.width,
        "num_frames": params.num_frames,
        "steps": params.num_inference_steps,
        "branches": None if scale is None else 2 if scale > 1 else 1,
    }


def _say(text: str) -> None:
    """Print what goes with a picture, which is written to its file whether or not anybody reads this."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        if not close_unread():
            raise


def _print_layout(omni: Omni, model: str, num_engines: int = 1) -> None:
    info = omni.info
    each = f"{num_engines} engines, each: " if num_engines > 1 else ""
    start = "" if is_terminal() else f"start   {format_seconds(info.start_s)}\n"  # a terminal has just shown it
    _say(f"model   {model}: {info.capabilities.name}, {info.dtype} on {info.device}")
    _say(f"{start}layout  {each}{info.layout}")


def _print_times(output: OmniRequestOutput) -> None:
    took = output.metrics
    tokens = " + ".join(f"{count} {name}" for name, count in took["tokens"].items())
    _say(
        f"times   {took['total_s']:.2f} s: text encoder {took['text_encoder_s']:.2f} s, "
        f"{took['num_steps']} steps of {took['denoise_step_s']:.3f} s, VAE {took['vae_s']:.2f} s"
        + (f" on {took['vae_ranks']} ranks" if took.get("vae_ranks", 1) > 1 else "")
    )
    if branches := took.get("branches"):
        steps = branches["steps"] or 1
        shared = f"{branches['units'] / steps:.3g} transformer calls a step in {branches['rounds'] / steps:.3g} rounds"
        _say(f"guided  {branches['note'] or shared}")
    _say(f"tokens  {tokens or 'not counted'}; seed {took['seed']}")
    note = dropped_tokens_note(took)
    if note is not None:
        _say(f"note    {note}")
