"""The ``omni-sp`` command, one function a subcommand. Whatever goes wrong is one line on stderr and an exit code.

Exit codes: 0 done; 1 a failure; 2 bad input; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from omni_sp.config import DiffusionParallelConfig, OmniDiffusionSamplingParams
from omni_sp.errors import ConfigError, InvalidInputError, OmniSPError, SamplingParamsError
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
    _add_generate_options(commands.add_parser("generate", help="draw pictures", allow_abbrev=False))
    _add_check_options(commands.add_parser("check", help="is a model exact over several ranks?", allow_abbrev=False))
    _add_models_options(commands.add_parser("models", help="what is known of which transformer", allow_abbrev=False))
    return _run(parser, arguments)


def text_to_image(arguments: Sequence[str] | None = None) -> int:
    """Run ``omni-sp generate`` as a program of its own. Returns the exit code."""
    parser = _Parser(description="Draw pictures from text, one picture over several ranks.", allow_abbrev=False)
    _add_generate_options(parser)
    return _run(parser, arguments)


def generate(options: argparse.Namespace) -> int:
    """Draw pictures: ``omni-sp generate``."""
    prompts = options.prompt or []
    if not prompts:
        raise SamplingParamsError('no prompt: give at least one --prompt "..."')
    config = DiffusionParallelConfig(ulysses_degree=options.ulysses_degree, ring_degree=options.ring_degree)
    params = _sampling_params(options)
    files = PictureFiles(options.output, num_pictures=len(prompts) * (params.num_outputs_per_prompt or 1))
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
        if omni.info.facts.makes_videos:
            raise ConfigError(f"{omni.info.facts.name} makes videos; omni-sp generate writes pictures: use Omni(...)")
        if params.true_cfg_scale is not None and omni.info.facts.taken_as("true_cfg_scale") is None:
            params = _with_guidance_scale(params)
        outputs = omni.generate_each(prompts, params)
        if omni.speaks:
            _print_layout(omni, options.model)
        for output in outputs:
            if omni.speaks:
                _print_output(output, [files.save(image) for image in output.images])
    return 0


def check(options: argparse.Namespace) -> int:
    """Run a model on one rank and on many, and tell how far apart they are: ``omni-sp check``."""
    config = DiffusionParallelConfig(ulysses_degree=options.ulysses_degree, ring_degree=options.ring_degree)
    if config.world_size == 1:
        raise ConfigError("nothing to check on one rank: give --ulysses-degree or --ring-degree above 1")
    from omni_sp.omni import Omni

    params = OmniDiffusionSamplingParams(
        height=options.height, width=options.width, num_inference_steps=options.num_inference_steps
    )
    prompt: dict[str, Any] = {"prompt": options.prompt}
    if options.image is not None:
        prompt["image"] = _read_picture(options.image)
    with Omni(
        options.model,
        config,
        device=None if options.device == "auto" else options.device,
        dtype=options.dtype,
        attention_backend=options.attention_backend,
    ) as omni:
        errors = omni.check(prompt, params)
        if not omni.speaks:
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
    counts = [f"{sum(one.state == name for one in states)} {name}" for name in ("exact", "refused", "unproven")]
    print(f"{len(states)} classes: {', '.join(counts)}")
    return 0


def _read_picture(path: str) -> Any:
    from PIL import Image

    try:
        return Image.open(Path(path).expanduser()).convert("RGB")
    except OSError as error:
        raise ConfigError(f"--image {path} cannot be read: {error}") from error


class PictureFiles:
    """Where pictures go: a file of its own name, numbered names where there are several, or new names in a folder.

    Args:
        path: a folder (it exists, ends in a slash, or has no suffix), or a file. num_pictures: how many there will be.

    Attributes:
        saved: what has been written so far.

    Raises:
        ConfigError: pillow cannot write such files, or nothing can be written there. Nothing is created by asking.
    """

    def __init__(self, path: str, num_pictures: int) -> None:
        target = Path(path).expanduser()
        self.saved: list[Path] = []
        self._several = num_pictures > 1
        self._digits = len(str(num_pictures))
        self._is_folder = target.is_dir() or path.endswith(os.sep) or not target.suffix
        self._target = target
        if not self._is_folder and target.suffix.lower() not in _writable_suffixes():
            raise ConfigError(f"--output {path}: {target.suffix} is no picture format; use .png, .jpg or .webp")
        try:
            _require_writable(target, target if self._is_folder else target.parent)
        except OSError as error:
            raise ConfigError(f"--output {path} cannot be written: {error.strerror or error}") from error

    def save(self, image: Any) -> Path:
        """Write one picture. Returns where it is."""
        path = self._next()
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        self.saved.append(path)
        return path

    def _next(self) -> Path:
        number = len(self.saved) + 1
        if self._is_folder:
            while (path := self._target / f"picture-{number:04}.png").exists():
                number += 1
            return path
        if self._several:
            return self._target.with_stem(f"{self._target.stem}-{number:0{self._digits}}")
        return self._target


def _writable_suffixes() -> set[str]:
    from PIL import Image

    formats = Image.registered_extensions()  # loads pillow's plugins
    return {suffix for suffix, name in formats.items() if name in Image.SAVE}


def _require_writable(target: Path, folder: Path) -> None:
    """Raise OSError if nothing could be written into a folder that exists or could be made."""
    if target.is_file():
        with target.open("ab"):
            return
    while not folder.exists():
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


def _add_check_options(parser: _Parser) -> None:
    parser.set_defaults(run=check, parser=parser)
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"hub id, folder of a diffusers pipeline, or {SHAPES_MODEL}")
    _add_layout_options(parser)
    add("--prompt", default="a red circle", metavar="TEXT")
    add("--image", metavar="PATH", help="picture to start from, where the pipeline takes one")
    add("--width", type=int, metavar="PIXELS")
    add("--height", type=int, metavar="PIXELS")
    add("--num-inference-steps", type=int, metavar="N")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add("--debug", action="store_true", help="show the traceback of an error")


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


def _add_generate_options(parser: _Parser) -> None:
    parser.set_defaults(run=generate, parser=parser)
    add = parser.add_argument
    add("--model", default=SHAPES_MODEL, help="hub id, folder of a diffusers pipeline, or %(default)s (the default)")
    add("--prompt", action="append", metavar="TEXT", help="what to draw; repeat it for more pictures")
    add("--negative-prompt", metavar="TEXT", help="what to keep away from")
    _add_layout_options(parser)
    add("--width", type=int, metavar="PIXELS")
    add("--height", type=int, metavar="PIXELS")
    add("--num-inference-steps", type=int, metavar="N", help="denoising steps")
    add(
        "--cfg-scale",
        type=float,
        metavar="X",
        help="guidance: true_cfg_scale where the model has it, or guidance_scale",
    )
    add("--guidance-scale", type=float, metavar="X", help="the pipeline's own guidance_scale")
    add("--seed", type=int, metavar="N", help="the same seed draws the same picture; without it, a fresh one")
    add("--num-images-per-prompt", type=int, metavar="N")
    add("--output", default="pictures", metavar="PATH", help="picture file or folder (%(default)s)")
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
    options, unknown = parser.parse_known_args([_with_dashes(word) for word in words])
    if unknown:
        options.parser.refuse(unknown[0])
    command: Callable[[argparse.Namespace], int] = options.run
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning  # type: ignore[assignment]  # the rest of its arguments is not looked at
        return _ended(command, options)


def _ended(command: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """The exit code of a subcommand, whatever becomes of it."""
    try:
        return command(options)
    except KeyboardInterrupt:
        return _give_up(options, "stopped by Ctrl-C", INTERRUPTED)
    except InvalidInputError as error:
        return _give_up(options, str(error), BAD_INPUT)
    except OmniSPError as error:
        return _give_up(options, str(error), FAILED)
    except Exception as error:
        return _give_up(options, f"{type(error).__name__}: {error}", FAILED)


def _with_dashes(word: str) -> str:
    """``--ring_degree=2`` as ``--ring-degree=2``; values stay as they are."""
    if not re.match(r"--[A-Za-z][\w-]*(=|$)", word):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _show_warning(message: Warning | str, *_: Any) -> None:
    """A warning as a line for people, without the place in the code that Python adds."""
    print(f"omni-sp: note: {' '.join(str(message).split())}", file=sys.stderr)


def _give_up(options: argparse.Namespace, message: str, exitcode: int) -> int:
    with contextlib.suppress(BrokenPipeError):
        if options.debug:
            traceback.print_exc()
        saved: list[Path] = getattr(options, "saved", [])
        kept = f" (finished before and kept: {', '.join(map(str, saved))})" if saved else ""
        what = message if exitcode == INTERRUPTED else f"error: {message}"
        print(f"omni-sp: {' '.join(what.split())}{kept}", file=sys.stderr, flush=True)
    return exitcode


def _sampling_params(options: argparse.Namespace) -> OmniDiffusionSamplingParams:
    return OmniDiffusionSamplingParams(
        height=options.height,
        width=options.width,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        true_cfg_scale=options.cfg_scale,
        negative_prompt=options.negative_prompt,
        num_outputs_per_prompt=options.num_images_per_prompt,
        seed=options.seed,
    )


def _with_guidance_scale(params: OmniDiffusionSamplingParams) -> OmniDiffusionSamplingParams:
    """--cfg-scale for a pipeline whose only guidance is guidance_scale."""
    if params.guidance_scale is not None:
        raise SamplingParamsError("--cfg-scale and --guidance-scale mean the same to this pipeline: give one of them")
    return dataclasses.replace(params, guidance_scale=params.true_cfg_scale, true_cfg_scale=None)


def _print_layout(omni: Omni, model: str) -> None:
    info = omni.info
    print(f"model   {model}: {info.facts.name}, {info.dtype} on {info.device}, loaded in {info.load_s:.1f} s")
    print(f"layout  {info.layout}", flush=True)


def _print_output(output: OmniRequestOutput, paths: list[Path]) -> None:
    took = output.metrics
    tokens = " + ".join(f"{count} {name}" for name, count in took["tokens"].items())
    print(
        f"times   {took['total_s']:.2f} s: text encoder {took['text_encoder_s']:.2f} s, "
        f"{took['num_steps']} steps of {took['denoise_step_s']:.3f} s, VAE {took['vae_s']:.2f} s"
    )
    print(f"tokens  {tokens or 'not counted'}; seed {took['seed']}")
    for path in paths:
        print(f"picture {path}", flush=True)
