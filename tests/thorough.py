"""Whether to try everything that is proven, or what a change is likely to break."""

from __future__ import annotations

import os

import pytest

THOROUGH = os.environ.get("OMNI_SP_THOROUGH") == "1"
thorough_only = pytest.mark.skipif(not THOROUGH, reason="tried with OMNI_SP_THOROUGH=1")
