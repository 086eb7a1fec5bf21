"""What vLLM's command calls when ``--omni`` is among its arguments: ``vllm serve MODEL --omni ...``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from omni_sp.cli import main as omni_sp_main
from omni_sp.command_line import BAD_INPUT
from omni_sp.errors import ConfigError
from vllm_omni.entrypoints.cli.translate import as_omni_sp


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``omni-sp`` with the translated words, and end the program with its exit code.

    Args:
        arguments: without the program's name; None for those of this program.
    """
    try:
        words = as_omni_sp(sys.argv[1:] if arguments is None else arguments, os.environ)
    except ConfigError as error:
        print(f"omni-sp: error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    sys.exit(omni_sp_main(words))
