"""What vLLM calls, in each of its processes, as soon as it looks for plugins. Inert unless our flags are given."""

from __future__ import annotations

import sys

from omni_sp.errors import InvalidInputError
from omni_sp.llm import adapter, arguments, cpu, steps

_MODELS = "omni_sp.llm.models"


def register() -> None:
    """Offer our decoders to vLLM, and turn our flags on its command line into its own. May be called twice."""
    for architecture in adapter.ARCHITECTURES:
        adapter.register(architecture, f"{_MODELS}:{architecture}")
    if not arguments.is_vllms_command():
        return
    try:
        rewritten = arguments.for_vllm(sys.argv[1:])
    except InvalidInputError as error:
        print(f"omni-sp: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if rewritten != sys.argv[1:]:
        sys.argv[1:] = rewritten
        steps.count_here()
        if adapter.runs_on_cpu():
            cpu.settle(arguments.world_size(rewritten), memory_is_told=arguments.tells_memory(rewritten))
