"""What vLLM's command calls when ``--omni`` is among its arguments: ``vllm serve MODEL --omni ...``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from omni_sp.cli import main as omni_sp_main


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``omni-sp`` with the same words, and end the program with its exit code.

    Args:
        arguments: without the program's name; None for those of this program.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(omni_sp_main([word for word in words if word != "--omni"]))
