"""The options of every command as tables: each entry says its flags, and what takes its value under which name."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_sp.cli.values import adapters, adapters_of_a_server, extra_args, keys_in, lora_entries, sizes, unless_auto
from omni_sp.config import LAUNCHERS, DiffusionParallelConfig, OmniDiffusionSamplingParams
from omni_sp.errors import ConfigError, SamplingParamsError
from omni_sp.pipelines.shapes import SHAPES_MODEL
from omni_sp.server.settings import LOG_FORMATS, LOG_LEVELS, ServerSettings

# What takes the value of an option: DiffusionParallelConfig, Omni or AsyncOmni, OmniDiffusionSamplingParams,
# ServerSettings, plan(), examine().
DEGREES, ENGINE, PARAMS, SERVER, PLANNER = "degrees", "engine", "params", "server", "planner"
EXAMINATION = "examination"
_MIB = 2**20
_SETTINGS = ServerSettings()
_METAVARS = {int: "N", float: "X", Path: "PATH"}


class Option:
    """One option of a command.

    Args:
        flags: the names on the command line, separated by spaces; a name without dashes is a positional argument.
        text: the help: what the option does. Its default is added.
        owner: DEGREES, ENGINE, PARAMS, SERVER, PLANNER or EXAMINATION; None where only the command itself reads it.
        field: the name that the value has there; by default the first flag with underscores.
        convert: makes the field's value of the option's.
        unit: how much of the field one of the option is.
        otherwise: what holds without the option, where no value of its own says it.
        argparse: further arguments of ``ArgumentParser.add_argument``. The default of an option of ServerSettings is
            the default there.
    """

    def __init__(
        self,
        flags: str,
        text: str,
        owner: str | None = None,
        field: str | None = None,
        convert: Callable[[Any], Any] | None = None,
        unit: int = 1,
        otherwise: str = "none",
        **argparse: Any,
    ) -> None:
        self.flags, self.owner = tuple(flags.split()), owner
        self.dest = self.flags[0].lstrip("-").replace("-", "_")
        self.field = field or self.dest
        if argparse.get("action") == "append":
            argparse.setdefault("default", [])
            convert = convert or tuple
        elif owner == SERVER and convert is None:
            default = getattr(_SETTINGS, self.field)
            argparse["default"] = default if unit == 1 else default // unit
        if argparse.get("type") in _METAVARS:
            argparse.setdefault("metavar", _METAVARS[argparse["type"]])
        is_required = not self.flags[0].startswith("-") and "nargs" not in argparse
        self.argparse = {
            **argparse,
            "help": text if is_required else f"{text} (default: {_shown(argparse, otherwise)})",
        }
        self.convert = convert or (lambda value: value if unit == 1 else value * unit)


def _shown(argparse: dict[str, Any], otherwise: str) -> str:
    """The default of an option, as its help says it."""
    default = argparse.get("default")
    if argparse.get("action") == "store_true":
        return "off"
    if default in (None, "") or isinstance(default, list):
        return otherwise
    return "%(default)g" if isinstance(default, float) else "%(default)s"  # an example has defaults of its own


def arguments_for(owner: str, table: Sequence[Option], options: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments that the options of a command give to one owner.

    Args:
        owner: DEGREES, ENGINE, PARAMS, SERVER, PLANNER or EXAMINATION.
        table: the options of the command.
        options: their values.

    Returns:
        Field -> value. A field whose options are not given is left out, so that the owner's default holds. Two options
        of one field add up.
    """
    found: dict[str, Any] = {}
    for option in table:
        if option.owner != owner:
            continue
        value = getattr(options, option.dest)
        value = None if value is None else option.convert(value)
        if value is not None:
            found[option.field] = found[option.field] + value if option.field in found else value
    return found


def parallel_config(
    table: Sequence[Option],
    options: argparse.Namespace,
    say: Callable[[str], None],
    *,
    request: Mapping[str, Any] | None = None,
    joins: bool = True,
) -> DiffusionParallelConfig:
    """The degrees that are given, or those that ``--parallel auto`` chooses.

    Args:
        table: the options of the command.
        options: their values.
        say: called with a line on what was chosen, and why.
        request: what is drawn, see `omni_sp.engine.automatic.automatic_config`.
        joins: see there.

    Raises:
        ConfigError: degrees beside ``--parallel``, or what cannot be.
    """
    given = arguments_for(DEGREES, table, options)
    if options.parallel is None:
        return DiffusionParallelConfig(**given)
    for name in ("cfg_parallel_size", "ulysses_degree", "ring_degree"):
        if given.pop(name) != 1:
            raise ConfigError(f"--parallel chooses {name}: leave out one of the two")
    if given.get("data_parallel_size", 1) > 1 and ":" not in options.parallel:
        raise ConfigError("--parallel auto takes all devices: say how many ranks each engine has, such as auto:4")
    from omni_sp.engine.automatic import automatic_config, is_automatic
    from omni_sp.engine.devices import check_device_name
    from omni_sp.engine.launchers import check_launcher
    from omni_sp.pipelines.load import resolve_model

    engine = arguments_for(ENGINE, table, options)
    is_automatic(options.parallel)
    check_launcher(options.launcher, options.nodes, options.parallel)
    check_device_name(engine.get("device"))
    config = automatic_config(
        options.parallel,
        resolve_model(options.model, engine.get("single_file_config")),
        device=engine.get("device"),
        dtype=engine.get("dtype"),
        offloads=engine.get("offload") is not None,
        quantization=engine.get("quantization"),
        joins=joins,
        timeout_s=engine.get("rank_timeout_s", 600.0),
        request=request,
        say=say,
    )
    given["shard_weights"] |= config.shard_weights
    return dataclasses.replace(config, **given)


def sampling_params(options: argparse.Namespace) -> OmniDiffusionSamplingParams:
    """The parameters of ``generate``, with --cfg-scale as true_cfg_scale: see with_cfg_scale().

    Raises:
        SamplingParamsError: two options of one thing, or a value that cannot be.
    """
    params = OmniDiffusionSamplingParams(**arguments_for(PARAMS, GENERATE, options), lora=lora_scales(options))
    if options.cfg_scale is None:
        return params
    if options.true_cfg_scale is not None:
        raise SamplingParamsError("--cfg-scale and --true-cfg-scale are two names of one thing: give one of them")
    return dataclasses.replace(params, true_cfg_scale=options.cfg_scale)


def with_cfg_scale(params: OmniDiffusionSamplingParams, scale: float, *, is_true: bool) -> OmniDiffusionSamplingParams:
    """Give --cfg-scale to the guidance that the pipeline has.

    Args:
        params: of sampling_params().
        scale: the value of --cfg-scale.
        is_true: whether the pipeline has true_cfg_scale; otherwise its guidance is guidance_scale.

    Raises:
        SamplingParamsError: the pipeline has guidance_scale alone, and that is given too.
    """
    if is_true:
        return params
    if params.guidance_scale is not None:
        raise SamplingParamsError("--cfg-scale and --guidance-scale mean the same to this pipeline: give one of them")
    return dataclasses.replace(params, guidance_scale=scale, true_cfg_scale=None)


def lora_scales(options: argparse.Namespace) -> list[tuple[str, float]] | None:
    """The adapters of ``--lora``, each with its scale: all of them are on. None where there are none."""
    entries = lora_entries(options.lora)
    return [(name, 1.0 if scale is None else scale) for name, (_, scale) in entries.items()] or None


_DTYPES = ("float32", "bfloat16", "float16")
_SWITCH = {"auto": "auto", "on": True, "off": False}

# One entry a line reads as a table.
# fmt: off
_MODEL_TEXT = f"what draws: a hub id, the folder of a diffusers pipeline, a file of weights, or {SHAPES_MODEL}"
_LAYOUT = (
    Option("--parallel", "auto: the planner chooses the degrees for the GPUs, or the cores of the CPU, that are there; "
           "auto:4 for 4 ranks", metavar="auto[:N]", otherwise="the degrees that are given"),
    Option("--cfg-parallel-size --cfg", "groups of ranks that share the branches of guidance", DEGREES, type=int,
           default=1),
    Option("--ulysses-degree --usp", "ranks that trade tokens for heads", DEGREES, type=int, default=1),
    Option("--ring-degree --ring", "ranks that keys and values travel around", DEGREES, type=int, default=1),
    Option("--vae-parallel", "whether all ranks encode and decode together, each its part of the rows; auto: for "
           "videos, and for pictures whose longer side has 1024 pixels or more",
           DEGREES, convert=_SWITCH.get, default="auto", choices=tuple(_SWITCH)),
    Option("--text-encoder-parallel", "whether each text or image encoder runs on one rank for all, which alone reads "
           "its weights; auto: yes", DEGREES, convert=_SWITCH.get, default="auto", choices=tuple(_SWITCH)),
    Option("--shard-weights", "each rank keeps its part of a transformer's weights, and gathers a block's when it runs",
           DEGREES, default=False, action="store_true"),
    Option("--quantization", "keep the weights of transformers in 8 bits; needs torchao", ENGINE,
           choices=("int8", "fp8")),
    Option("--offload", "what does not run waits on the CPU: a part of the pipeline at a time is on the GPU, or one "
           "layer of all", ENGINE, choices=("model", "group")),
    Option("--vae-dtype", "of the VAE", ENGINE, choices=_DTYPES, otherwise="that of the others"),
    Option("--device", "auto (GPUs where there are any), cpu, cuda, or cuda:N for all ranks on one GPU",
           ENGINE, convert=unless_auto, default="auto"),
    Option("--launcher", "what starts the ranks: spawn, on this machine; torchrun, which has started them; ray, on a "
           "Ray cluster", ENGINE, choices=LAUNCHERS, otherwise="torchrun inside its jobs, else spawn"),
    Option("--nodes", "with --launcher ray, how many nodes share the ranks of an engine equally", ENGINE, type=int,
           otherwise="as few as can be"),
    Option("--attention-backend", "the attention kernel; auto chooses an exact one, tune times them",
           ENGINE, default="auto", metavar="NAME"),
    Option("--no-replay", "follow the blocks of a transformer every time, instead of replaying what they did",
           ENGINE, "replay", convert=lambda off: not off, action="store_true"),
    Option("--cuda-graphs", "on GPUs, capture forwards whose blocks are all replayed as CUDA graphs",
           ENGINE, action="store_true"),
    Option("--compile", "compile what the blocks of a transformer do: the first picture takes minutes, others less",
           ENGINE, action="store_true"),
)
_REPLICAS = Option("--data-parallel-size", "engines side by side behind one queue, each with its own ranks", DEGREES,
                   type=int, default=1)
_DTYPE = Option("--dtype", "of weights and latents; auto: bfloat16 on GPUs, float32 on CPUs",
                ENGINE, convert=unless_auto, default="auto", choices=("auto", *_DTYPES))
_FILE = Option("--single-file-config", "of a model that is one file: the pipeline that it is of, a folder or hub id",
               ENGINE, metavar="MODEL", otherwise="diffusers tells it by the file")
_LORA = Option("--lora", "a LoRA adapter to draw with: a folder, a file or a hub id, and how much it counts (1 where "
               "that is left out); repeatable", ENGINE, convert=adapters, action="append", metavar="NAME=PATH[@SCALE]")
_IMAGE = Option("--image", "a picture to edit or to start from; repeat it where the model takes several",
                action="append", metavar="PATH")
_OWN = "the pipeline's own"
_SIZE = (
    Option("--width", "of a picture or of a video's frames", PARAMS, type=int, metavar="PIXELS", otherwise=_OWN),
    Option("--height", "of a picture or of a video's frames", PARAMS, type=int, metavar="PIXELS", otherwise=_OWN),
    Option("--num-frames", "frames of a video", PARAMS, type=int, otherwise=_OWN),
    Option("--num-inference-steps", "denoising steps", PARAMS, type=int, otherwise=_OWN),
)
GENERATE = (
    Option("--model", _MODEL_TEXT, default=SHAPES_MODEL),
    _FILE,
    Option("--prompt", "what to draw; repeat it for more outputs", action="append", metavar="TEXT"),
    Option("--negative-prompt", "what to keep away from", PARAMS, metavar="TEXT"),
    _IMAGE,
    _LORA,
    *_LAYOUT,
    _REPLICAS,
    *_SIZE,
    Option("--fps", "frames a second of a video", PARAMS, type=float,
           otherwise="the pipeline's own, or 16 where it has none"),
    Option("--cfg-scale", "guidance: true_cfg_scale where the model has it, or guidance_scale", type=float,
           otherwise=_OWN),
    Option("--true-cfg-scale", "the argument true_cfg_scale of the pipeline", PARAMS, type=float, otherwise=_OWN),
    Option("--guidance-scale", "the argument guidance_scale of the pipeline", PARAMS, type=float, otherwise=_OWN),
    Option("--max-sequence-length", "the longest text, in tokens", PARAMS, type=int, otherwise=_OWN),
    Option("--seed", "of the noise: the same seed draws the same picture", PARAMS, type=int, otherwise="a random one"),
    Option("--num-outputs-per-prompt --num-images-per-prompt", "results of each prompt", PARAMS, type=int,
           otherwise="1"),
    Option("--extra", "another argument of the pipeline's own call, such as strength=0.6 or 'sigmas=[1.0, 0.5]'; "
           "repeatable", PARAMS, "extra_args", extra_args, action="append", metavar="NAME=JSON"),
    Option("--no-metadata", "leave the prompt, the seed and the other settings out of the files of pictures",
           action="store_true"),
    Option("--output", "a folder for new numbered files, or one file: .png, .jpg, .webp, ... for pictures, .mp4 for "
           "videos, .wav for sounds", metavar="PATH", otherwise="the folder pictures, videos or sounds"),
    _DTYPE,
    Option("--attention-strategy", "whose parallel attention: omni_sp or yunchang",
           ENGINE, default="omni_sp", metavar="NAME"),
)
CHECK = (
    Option("model", _MODEL_TEXT, metavar="MODEL"),
    _FILE,
    *_LAYOUT,
    Option("--prompt", "what to draw", default="a red circle on a blue background", metavar="TEXT"),
    _IMAGE,
    _LORA,
    *_SIZE,
    Option("--dtype", "of weights and latents", ENGINE, default="float32", choices=_DTYPES),
)
DOCTOR = (
    Option("--device", "auto (GPUs where there are any), cpu, cuda, or cuda:N for all ranks on one GPU",
           EXAMINATION, convert=unless_auto, default="auto"),
    Option("--ranks", "how many to start", EXAMINATION, type=int, otherwise="one on each GPU, or two on the CPU"),
    Option("--model", "at whose shapes kernels are timed: a name, a folder or a repository, as for omni-sp plan",
           EXAMINATION, metavar="MODEL", otherwise="Qwen-Image"),
    Option("--quick", "look only: start no ranks, measure and prove nothing", EXAMINATION, action="store_true"),
    Option("--timeout", "the longest that ranks may take to start, or for one thing that they do, in seconds",
           EXAMINATION, "timeout_s", type=float, default=120.0, metavar="S"),
    Option("--json", "print one JSON object", action="store_true"),
)
INFO = (
    Option("file", "picture that was drawn here: .png, .jpg or .webp", metavar="FILE"),
    Option("--json", "print one JSON object", action="store_true"),
)
PLAN = (
    Option("model", "a model's name (Qwen-Image, FLUX.1-dev, Wan2.2, ...), a folder, or a repository in the hub's "
           "cache, of which only the configuration is read", metavar="MODEL"),
    Option("--gpus", "number of devices", PLANNER, type=int, otherwise="1, or with --here as many as were measured"),
    Option("--gpu", "kind of device: H100, A100, L20, RTX4090, CPU, ...; an unknown name lists all",
           PLANNER, default="H100", metavar="NAME"),
    Option("--here", "take what `omni-sp doctor` measured on this machine in place of --gpu", action="store_true"),
    Option("--link", "what connects the devices: nvlink4, pcie4, ethernet-100, ...; an unknown name lists all",
           metavar="NAME", otherwise="that of the GPU"),
    Option("--height", "pixels", PLANNER, type=int, otherwise="the published size"),
    Option("--width", "pixels", PLANNER, type=int, otherwise="the published size"),
    Option("--num-frames", "frames of a video", PLANNER, type=int, otherwise="the published number"),
    Option("--num-inference-steps --steps", "denoising steps", PLANNER, "steps", type=int, otherwise=_OWN),
    Option("--branches", "forwards of a step: 2 with a negative prompt", PLANNER, type=int, otherwise=_OWN),
    Option("--throughput", "prefer the most results an hour to the shortest time of one", PLANNER, action="store_true"),
    Option("--consider-all", "weigh also what this version does not have of sharded weights and offload",
           action="store_true"),
    Option("--json", "print one JSON object", action="store_true"),
    Option("--plot", "draw what each choice spends its time on, as .svg", type=Path),
)
MODELS = (Option("--markdown", "print the table of the page docs/models.md", action="store_true"),)
SERVE = (
    Option("model", _MODEL_TEXT, SERVER, nargs="?", metavar="MODEL"),
    _FILE,
    Option("--served-model-name", "what requests call the model; repeatable",
           SERVER, "served_model_names", action="append", metavar="NAME", otherwise="MODEL"),
    Option("--host", "the address to listen on; 0.0.0.0 for all of this machine", SERVER),
    Option("--port", "the port to listen on; 0 takes a free one", SERVER, type=int),
    *_LAYOUT,
    _REPLICAS,
    _DTYPE,
    Option("--rank-timeout", "the longest silence of ranks between two steps, in seconds, before they count as failed",
           ENGINE, "rank_timeout_s", type=float, default=600.0, metavar="S"),
    Option("--startup-timeout", "the same while they load the model",
           ENGINE, "startup_timeout_s", type=float, default=3600.0, metavar="S"),
    Option("--lora", "a LoRA adapter that requests may name: a folder, a file or a hub id; repeatable",
           ENGINE, convert=adapters_of_a_server, action="append", metavar="NAME=PATH"),
    Option("--warmup", "draw one step of this size before /health answers 200; height first, unlike the API's size; "
           "repeatable",
           ENGINE, convert=sizes, action="append", metavar="HEIGHTxWIDTH"),
    Option("--api-key", "let in only who has this key; repeatable",
           SERVER, "api_keys", action="append", metavar="KEY", otherwise="whoever reaches the port may draw"),
    Option("--api-key-file", "a file of such keys, one a line, which ps does not show",
           SERVER, "api_keys", keys_in, type=Path),
    Option("--allow-origin", "web pages of this origin may call from a browser; repeatable",
           SERVER, "allow_origins", action="append", metavar="ORIGIN"),
    Option("--data-dir", "keep videos, pictures and jobs in this folder", SERVER, type=Path,
           otherwise="a temporary one, which ends with the server"),
    Option("--file-max-age", "seconds that finished pictures and videos are kept",
           SERVER, "file_max_age_s", type=float, metavar="S"),
    Option("--file-max-mib", "the most MiB of them that are kept", SERVER, "file_max_total_bytes", unit=_MIB, type=int),
    Option("--max-queue-length", "requests that may wait", SERVER, type=int),
    Option("--max-batch-size", "the most requests that are drawn together", ENGINE, type=int, default=1),
    Option("--batch-wait-ms", "how long a request may wait for others to be drawn with, in milliseconds",
           ENGINE, type=float, default=0.0, metavar="MS"),
    Option("--max-pixels", "the most width × height that a request may draw or upload", SERVER, type=int),
    Option("--max-input-pixels", "the most width × height of all pictures that a request uploads, together",
           SERVER, type=int),
    Option("--max-steps", "the most denoising steps of a request", SERVER, type=int),
    Option("--max-n", "the most results of a request", SERVER, type=int),
    Option("--max-frames", "the most frames of a video", SERVER, type=int),
    Option("--max-video-pixel-steps", "the most width × height × frames × denoising steps of a video",
           SERVER, type=int),
    Option("--max-body-mib", "the most MiB of a request, uploaded pictures included",
           SERVER, "max_body_bytes", unit=_MIB, type=int),
    Option("--no-metadata", "leave the prompt, the seed and the other settings out of the files of pictures",
           SERVER, "metadata", lambda value: not value, action="store_true"),
    Option("--allow-url-images", "fetch pictures that chats name by http(s) URL", SERVER, action="store_true"),
    Option("--drain-timeout", "seconds that running requests may take to finish at the server's end",
           SERVER, "drain_timeout_s", type=float, metavar="S"),
    Option("--log-level", "what is logged on stderr: info is a line for each request", SERVER, choices=LOG_LEVELS),
    Option("--log-format", "text for people, or json for an object a line", SERVER, choices=LOG_FORMATS),
    Option("--ssl-certfile", "serve HTTPS with this certificate, in PEM", SERVER, type=Path, otherwise="HTTP"),
    Option("--ssl-keyfile", "the certificate's key, in PEM without a password", SERVER, type=Path,
           otherwise="in the certificate's file"),
    Option("--root-path", "the path below which a proxy shows this server, such as /draw", SERVER, metavar="PATH",
           otherwise="none"),
    Option("--forwarded-allow-ips", "proxies whose X-Forwarded-Proto and X-Forwarded-Host make the URLs in answers: "
           "addresses or networks with commas between them, or * for all", SERVER, metavar="IPS"),
)
# fmt: on
