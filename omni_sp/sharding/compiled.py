"""What may be compiled of a transformer: its blocks, never the whole of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from omni_sp.errors import ConfigError, UnsupportedModelError
from omni_sp.sharding.replay import block_lists

_WRAPPED = "_orig_mod"  # where torch.compile(module) keeps the module


def is_compiled(model: torch.nn.Module) -> bool:
    """Whether torch traces a transformer as a whole, or is just tracing it."""
    call = getattr(model, "_compiled_call_impl", None)
    # What shares the calls of a model stands before what was there.
    return getattr(call, "compiled", call) is not None or torch.compiler.is_compiling()


def is_any_compiled(model: torch.nn.Module) -> bool:
    """Whether torch traces a model, or any part of it, or is just tracing it."""
    methods = (getattr(model, name, None) for name in ("forward", "decode", "encode"))
    return any(is_compiled(module) or _WRAPPED in module._modules for module in model.modules()) or any(
        hasattr(method, "_torchdynamo_orig_callable") for method in methods
    )


def require_not_compiled(model: torch.nn.Module) -> None:
    """Refuse a transformer of which torch traces more than a block.

    Tokens are exchanged in the middle of a transformer, by code that is no part of a graph.

    Args:
        model: a transformer, as the caller has it.

    Raises:
        UnsupportedModelError: it is compiled, or a module in it is wrapped by torch.compile().
    """
    wrapped = next((path for path, module in model.named_modules() if _WRAPPED in module._modules), None)
    whole = getattr(model, _WRAPPED, model)
    if wrapped is None and not is_compiled(model):
        return
    name = type(whole).__name__
    what = f"{wrapped} of {name} is wrapped by torch.compile()" if wrapped else f"{name} is compiled as a whole"
    raise UnsupportedModelError(
        f"{what}, and ranks exchange tokens in the middle of it: leave it as it was, and have its blocks compiled, by "
        "parallelize(..., compile=True), or in place, before or after: transformer.compile_repeated_blocks(), or "
        "block.compile() for each"
    )


def compile_options(compile: bool | str | Mapping[str, Any], *, replay: bool = True) -> dict[str, Any] | None:
    """Options of torch.compile from what a user says.

    Args:
        compile: whether to compile, or a mode, or a dict of "mode", "backend" and "options".
        replay: whether blocks are replayed.

    Returns:
        None where nothing is compiled.

    Raises:
        ConfigError: there is no such mode or option, or what is never replayed cannot be compiled.
    """
    if compile is False:
        return None
    if not replay:
        raise ConfigError("compile=... needs replay=True: what is compiled is what was recorded for a replay")
    options = {} if compile is True else {"mode": compile} if isinstance(compile, str) else compile
    modes = [*torch._inductor.list_mode_options()]
    if not isinstance(options, Mapping) or not {*options} <= {"mode", "backend", "options"}:
        raise ConfigError(
            f"compile={compile!r}: give True, a mode ({', '.join(modes)}), or a dict of mode, backend and options"
        )
    if options.get("mode", "default") not in modes:
        raise ConfigError(f"compile={compile!r}: torch.compile has no such mode; it has {', '.join(modes)}")
    return dict(options)


def require_no_graphs(options: Mapping[str, Any] | None, *, cuda_graphs: bool) -> None:
    """Refuse CUDA graphs for weights that are sharded: a graph reads them where they lay when it was captured.

    Args:
        options: of torch.compile, or None.
        cuda_graphs: whether forwards are to be captured.

    Raises:
        ConfigError: what is asked for captures graphs.
    """
    mode = (options or {}).get("mode") or "default"
    captures = {**torch._inductor.list_mode_options(mode), **((options or {}).get("options") or {})}
    if cuda_graphs or captures.get("triton.cudagraphs"):
        what = "cuda_graphs=True" if cuda_graphs else f"compile={dict(options or {})}"
        raise ConfigError(
            f"{what} captures CUDA graphs, which read weights where they lay, and shard_weights=True moves them: "
            'leave one of them out, or take the mode "default" or "max-autotune-no-cudagraphs"'
        )


def compile_blocks(model: torch.nn.Module, options: Mapping[str, Any]) -> Callable[[], None]:
    """Compile the blocks of a transformer that runs on one rank, as diffusers' ``compile_repeated_blocks`` does.

    Args:
        model: a transformer.
        options: of torch.compile.

    Returns:
        What takes it back.
    """
    names = getattr(model, "_repeated_blocks", None) or ()
    blocks = [module for module in model.modules() if type(module).__name__ in names] or list(block_lists(model))
    blocks = [block for block in blocks if block._compiled_call_impl is None]
    for block in blocks:
        block.compile(fullgraph=True, **options)

    def undo() -> None:
        for block in blocks:
            block._compiled_call_impl = None

    return undo
