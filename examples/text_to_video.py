"""Draw a video from text, one video over several ranks.

python examples/text_to_video.py --prompt "a cat walks on grass" --ulysses-degree 2 --ring-degree 2
"""

import sys

from omni_sp.cli import example

if __name__ == "__main__":
    sys.exit(
        example(
            "Draw a video from text, one video over several ranks.",
            model="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        )
    )
