"""``python -m omni_sp.server``: the same as ``omni-sp serve``."""

from __future__ import annotations

import sys

from omni_sp.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
