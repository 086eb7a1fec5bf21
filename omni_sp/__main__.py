"""``python -m omni_sp``: the ``omni-sp`` command."""

from __future__ import annotations

import sys

from omni_sp.cli import main

if __name__ == "__main__":
    sys.exit(main())
