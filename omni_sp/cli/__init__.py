"""The ``omni-sp`` command, one function a subcommand. Whatever goes wrong is one line on stderr and an exit code.

Exit codes: 0 done; 1 a failure; 2 bad input; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from omni_sp.cli.options import make_prompt, sampling_params, with_cfg_scale
from omni_sp.command_line import with_dashes
from omni_sp.config import DiffusionParallelConfig, OmniDiffusionSamplingParams
from omni_sp.engine.startup import format_seconds, is_terminal
from omni_sp.errors import ConfigError, InvalidInputError, OmniSPError, SamplingParamsError
from omni_sp.files import OutputFiles, read_picture
from omni_sp.pipelines.shapes import SHAPES_MODEL

if TYPE_CHECKING:
    from omni_sp.omni import Omni
    from omni_sp.outputs import OmniRequestOutput

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
EXACT, AMPLIFIED = 1e-5, 1e-3
"""Relative differences in float32: of one transformer call, and of what later steps and the VAE may make of it."""


class _Parser(argparse.ArgumentParser):
    """Errors in one line, with the option that was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and end."""
        self.exit(BAD_INPUT, f"{self.prog}: error: {message}\n")

    def refuse(self, unknown: str) -> NoReturn:
        """Say that there is no such option and end."""
        options = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown, options, n=1)
        self.error(f"no option {unknown}; " + (f"did you mean {near[0]}?" if near else f"see {self.prog} --help"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``omni-sp``. Returns the exit code."""
    parser = _Parser(prog="omni-sp", description="Any diffusers pipeline over several processes or GPUs, exactly.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_generate_options(commands.add_parser("generate", help="draw pictures, videos or sounds", allow_abbrev=False))
    _add_check_options(commands.add_parser("check", help="is a model exact over several ranks?", allow_abbrev=False))
    _add_models_options(commands.add_parser("models", help="what is known of which transformer", allow_abbrev=False))
    serving = commands.add_parser("serve", help="answer OpenAI's clients over HTTP", allow_abbrev=False)
    commands.add_parser("serve-llm", help="vLLM's server for language models, with our flags", add_help=False)
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["serve-llm"]:
        return _exit_code(_serve_llm, argparse.Namespace(words=words[1:], debug=False))
    if words[:1] == ["serve"]:
        _add_serve_options(serving)  # here alone: nobody else should wait for a web framework, or need one
    return _run(parser, words)


def example(
    description: str,
    *,
    model: str = SHAPES_MODEL,
    output: str | None = None,
    needs_image: bool = False,
    arguments: Sequence[str] | None = None,
) -> int:
    """Run ``omni-sp generate`` as a program of its own, with defaults of its own. Returns the exit code.

    Args:
        description: for ``--help``. model, output: the defaults of these options. needs_image: refuse to begin without
            ``--image``.
    """
    written = "new files of the folder pictures, videos or sounds" if output is None else output
    parser = _Parser(description=f"{description} Writes {written}, unless --output says otherwise.", allow_abbrev=False)
    _add_generate_options(parser)
    parser.set_defaults(model=model, output=output, needs_image=needs_image)
    return _run(parser, arguments)


def generate(options: argparse.Namespace) -> int:
    """Draw what the pipeline makes, and write it to files: ``omni-sp generate``."""
    if options.needs_image and not options.image:
        raise SamplingParamsError("no picture to start from: give --image PATH")
    if not options.prompt and not options.image:
        raise SamplingParamsError('no prompt: give at least one --prompt "..."')
    config = DiffusionParallelConfig(ulysses_degree=options.ulysses_degree, ring_degree=options.ring_degree)
    params = sampling_params(options)
    pictures = [read_picture(path) for path in options.image]
    files = OutputFiles(options.output, num_outputs=max(len(options.prompt), 1) * (params.num_outputs_per_prompt or 1))
    options.saved = files.saved
    from omni_sp.omni import Omni  # after everything that can be refused without it

    with Omni(
        options.model,
        config,
        device=None if options.device == "auto" else options.device,
        dtype=None if options.dtype == "auto" else options.dtype,
        attention_backend=options.attention_backend,
        attention_strategy=options.attention_strategy,
    ) as omni:
        capabilities = omni.info.capabilities
        files.expect(capabilities)
        if options.cfg_scale is not None:
            params = with_cfg_scale(
                params, options.cfg_scale, is_true=capabilities.argument_name("true_cfg_scale") is not None
            )
        pictures = [picture.convert(capabilities.image_mode) for picture in pictures]
        outputs = omni.generate_each([make_prompt(text, pictures) for text in options.prompt or [None]], params)
        if omni.is_main:
            _print_layout(omni, options.model)
        for output in outputs:
            if omni.is_main:
                _print_times(output)
                for line in files.save(output):
                    print(line, flush=True)
    return 0


def check(options: argparse.Namespace) -> int:
    """Run a model on one rank and on many, and tell how far apart they are: ``omni-sp check``."""
    config = DiffusionParallelConfig(ulysses_degree=options.ulysses_degree, ring_degree=options.ring_degree)
    if config.world_size == 1:
        raise ConfigError("nothing to check on one rank: give --ulysses-degree or --ring-degree above 1")
    params = OmniDiffusionSamplingParams(
        height=options.height,
        width=options.width,
        num_frames=options.num_frames,
        num_inference_steps=options.num_inference_steps,
    )
    pictures = [read_picture(path) for path in options.image]
    from omni_sp.omni import Omni

    with Omni(
        options.model,
        config,
        device=None if options.device == "auto" else options.device,
        dtype=options.dtype,
        attention_backend=options.attention_backend,
    ) as omni:
        pictures = [picture.convert(omni.info.capabilities.image_mode) for picture in pictures]
        errors = omni.check(make_prompt(options.prompt, pictures), params)
        if not omni.is_main:
            return 0
        _print_layout(omni, options.model)
    print("stage, and its largest difference from one process, relative to its largest number")
    for stage, error in errors.items():
        print(f"  {stage:28}{error:.1e}")
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


def _serve_llm(options: argparse.Namespace) -> int:
    """Become vLLM's own command: its flags are its own business."""
    from omni_sp.llm.vllm.serve import serve_llm

    return serve_llm(options.words)


def _add_check_options(parser: _Parser) -> None:
    parser.set_defaults(run=check, parser=parser)
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"hub id, folder of a diffusers pipeline, or {SHAPES_MODEL}")
    _add_layout_options(parser)
    add("--prompt", default="a red circle", metavar="TEXT")
    _add_image_option(parser)
    add("--width", type=int, metavar="PIXELS")
    add("--height", type=int, metavar="PIXELS")
    add("--num-frames", type=int, metavar="N")
    add("--num-inference-steps", type=int, metavar="N")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add("--debug", action="store_true", help="show the traceback of an error")


def _add_serve_options(parser: _Parser) -> None:
    try:
        from omni_sp.server.process import add_serve_options
    except ModuleNotFoundError as error:
        parser.exit(BAD_INPUT, f"omni-sp: error: serving needs {error.name}: pip install 'omni-sp[serve]'\n")
    add_serve_options(parser)


def _add_models_options(parser: _Parser) -> None:
    parser.set_defaults(run=models, parser=parser)
    parser.add_argument("--markdown", action="store_true", help="as the page docs/models.md")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_layout_options(parser: _Parser) -> None:
    add = parser.add_argument
    add("--ulysses-degree", "--usp", type=int, default=1, metavar="N", help="ranks that trade tokens for heads")
    add("--ring-degree", "--ring", type=int, default=1, metavar="N", help="ranks that keys and values travel around")
    add(
        "--device",
        default="auto",
        help="auto (GPUs where there are any), cpu, cuda, or cuda:N for all ranks on one GPU",
    )
    add("--attention-backend", default="auto", metavar="NAME", help="attention kernel (%(default)s)")


def _add_image_option(parser: _Parser) -> None:
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="PATH",
        help="picture to edit or to start from; repeat it where the model takes several",
    )


def _add_generate_options(parser: _Parser) -> None:
    parser.set_defaults(run=generate, parser=parser, needs_image=False)
    add = parser.add_argument
    add("--model", default=SHAPES_MODEL, help=f"hub id, folder of a pipeline, or {SHAPES_MODEL} (default: %(default)s)")
    add("--prompt", action="append", default=[], metavar="TEXT", help="what to draw; repeat it for more outputs")
    add("--negative-prompt", metavar="TEXT", help="what to keep away from")
    _add_image_option(parser)
    _add_layout_options(parser)
    add("--width", type=int, metavar="PIXELS")
    add("--height", type=int, metavar="PIXELS")
    add("--num-frames", type=int, metavar="N", help="frames of a video")
    add(
        "--fps",
        type=float,
        metavar="X",
        help="frames a second of a video; without it, the pipeline's own default, or 16 where it has none",
    )
    add("--num-inference-steps", type=int, metavar="N", help="denoising steps")
    add(
        "--cfg-scale",
        type=float,
        metavar="X",
        help="guidance: true_cfg_scale where the model has it, or guidance_scale",
    )
    add("--true-cfg-scale", type=float, metavar="X", help="the pipeline's own true_cfg_scale")
    add("--guidance-scale", type=float, metavar="X", help="the pipeline's own guidance_scale")
    add("--max-sequence-length", type=int, metavar="N", help="longest text, in tokens")
    add("--seed", type=int, metavar="N", help="the same seed draws the same picture; without it, a fresh one")
    add("--num-outputs-per-prompt", "--num-images-per-prompt", type=int, metavar="N")
    add(
        "--extra",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="another argument of the pipeline's own call, such as strength=0.6 or 'sigmas=[1.0, 0.5]'",
    )
    add(
        "--output",
        metavar="PATH",
        help="folder or file: .png, .jpg, .webp, ... for pictures, .mp4 for videos, .wav for sounds "
        "(a folder: pictures, videos or sounds)",
    )
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="auto: bfloat16 on GPUs")
    add(
        "--attention-strategy",
        default="omni_sp",
        metavar="NAME",
        help="whose parallel attention (%(default)s, yunchang)",
    )
    add("--debug", action="store_true", help="show the traceback of an error")


def _run(parser: _Parser, arguments: Sequence[str] | None) -> int:
    """Parse, run the subcommand, and turn every error into one line and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without × must not end a run
    words = list(sys.argv[1:] if arguments is None else arguments)
    options, unknown = parser.parse_known_args([with_dashes(word) for word in words])
    if unknown:
        options.parser.refuse(unknown[0])
    command: Callable[[argparse.Namespace], int] = options.run
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning  # type: ignore[assignment]  # the rest of its arguments is not looked at
        return _exit_code(command, options)


def _exit_code(command: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """The exit code of a subcommand, whatever becomes of it."""
    try:
        return command(options)
    except KeyboardInterrupt:
        return _exit_with(options, "stopped by Ctrl-C", INTERRUPTED)
    except InvalidInputError as error:
        return _exit_with(options, str(error), BAD_INPUT)
    except OmniSPError as error:
        return _exit_with(options, str(error), FAILED)
    except Exception as error:
        return _exit_with(options, f"{type(error).__name__}: {error}", FAILED)


def _show_warning(message: Warning | str, *_: Any) -> None:
    """A warning as a line for people, without the place in the code that Python adds."""
    print(f"omni-sp: note: {' '.join(str(message).split())}", file=sys.stderr)


def _exit_with(options: argparse.Namespace, message: str, exitcode: int) -> int:
    with contextlib.suppress(BrokenPipeError):
        if options.debug:
            traceback.print_exc()
        saved: list[Path] = getattr(options, "saved", [])
        kept = f" (finished before and kept: {', '.join(map(str, saved))})" if saved else ""
        what = message if exitcode == INTERRUPTED else f"error: {message}"
        print(f"omni-sp: {' '.join(what.split())}{kept}", file=sys.stderr, flush=True)
    return exitcode


def _print_layout(omni: Omni, model: str) -> None:
    info = omni.info
    start = "" if is_terminal() else f"start   {format_seconds(info.start_s)}\n"  # a terminal has just been told
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
