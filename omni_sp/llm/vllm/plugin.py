"""The plugin that every process of vLLM loads. It changes nothing unless our flags are given."""

from __future__ import annotations

import sys

from omni_sp.errors import InvalidInputError
from omni_sp.llm.swiftkv import kv_sharing
from omni_sp.llm.vllm import cli_flags, cpu_env, internals

_MODELS = "omni_sp.llm.vllm.models"


def register() -> None:
    """Register our decoders with vLLM, and rewrite our flags on its command line. vLLM may call it twice."""
    for architecture in internals.ARCHITECTURES:
        internals.register(architecture, f"{_MODELS}:{architecture}")
    kv_sharing.register()
    if not cli_flags.is_vllm_command():
        return
    try:
        rewritten = cli_flags.for_vllm(sys.argv[1:], count_steps=True)
    except InvalidInputError as error:
        print(f"omni-sp: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if rewritten != sys.argv[1:]:
        sys.argv[1:] = rewritten
        if internals.runs_on_cpu():
            cpu_env.set_defaults(cli_flags.world_size(rewritten), memory_is_set=cli_flags.sets_memory(rewritten))
