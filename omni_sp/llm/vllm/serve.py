"""``omni-sp serve-llm``: vLLM's own server, with a help text for our flags."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from omni_sp.errors import ConfigError
from omni_sp.llm.vllm.cli_flags import for_vllm

HELP = """\
usage: omni-sp serve-llm MODEL [our flags] [every flag of `vllm serve`]

Starts vLLM's own server. With `vllm serve` itself, these flags work just as well.

  --ulysses-sequence-parallel-size N   ranks that share the tokens of a prompt (also --sequence-parallel-size)
  --tensor-parallel-size N             ranks, within each of those, that split the weights; the product is what runs
  --enable-shift-parallel              steps of few tokens run by tensor parallelism over all ranks
  --shift-parallel-threshold N         the most tokens of such a step (else measured at the first step)

Llama, Mistral, Qwen2 and Qwen3. The rest is vLLM's:
"""


def serve_llm(arguments: Sequence[str]) -> NoReturn:
    """Replace this process by ``vllm serve`` with these arguments; raises InvalidInputError as for_vllm() does."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed here: pip install 'omni-sp[vllm]'")
    if {"-h", "--help"} & set(arguments):
        print(HELP, flush=True)
    for_vllm(["serve", *arguments])  # raises before vLLM takes its seconds to start
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments])
