"""``omni-sp serve-llm``: vLLM's own server, with a help text for our flags."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence

from omni_sp.errors import ConfigError
from omni_sp.llm.vllm.cli_flags import for_vllm

HELP = """\
usage: omni-sp serve-llm MODEL [our flags] [every flag of `vllm serve`]

Starts vLLM's own server. With `vllm serve` itself, these flags work just as well.

  --ulysses-sequence-parallel-size N   ranks that share the tokens of a prompt (also --sequence-parallel-size)
  --tensor-parallel-size N             ranks, within each of those, that split the weights; the product is what runs
  --enable-shift-parallel              steps of few tokens run by tensor parallelism over all ranks
  --shift-parallel-threshold N         the most tokens of such a step (else measured at the first step)
  --speculative-config JSON            '{"method": "suffix"}': drafts from what was generated before (also on one rank);
                                       '{"method": "arctic", "model": DIR}': by a speculator trained for the model

Llama, Mistral, Qwen2 and Qwen3, and SwiftKV models of these but Mistral. The rest is vLLM's:
"""
_INSTALL = "pip install '.[vllm]'"


def serve_llm(arguments: Sequence[str]) -> int:
    """Replace this process by ``vllm serve`` with these arguments; raises InvalidInputError as for_vllm() does.

    Returns:
        The exit code 0, where help is asked for and vLLM, which has the rest of it, is not installed.
    """
    has_vllm = importlib.util.find_spec("vllm") is not None
    asks_for_help = bool({"-h", "--help"} & set(arguments))
    if asks_for_help:
        print(HELP if has_vllm else f"{HELP}it is not installed here ({_INSTALL})", flush=True)
    if has_vllm:
        for_vllm(["serve", *arguments])  # raises before vLLM takes its seconds to start
        os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments])
    if not asks_for_help:
        raise ConfigError(f"vLLM is not installed here: {_INSTALL}")
    return 0
