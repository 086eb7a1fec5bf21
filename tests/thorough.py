"""Whether to try everything that is proven, or what a change is likely to break."""

from __future__ import annotations

import os

THOROUGH = os.environ.get("OMNI_SP_THOROUGH") == "1"
