"""Draw a video that begins with a picture, over several ranks.

python examples/image_to_video.py --image cat.png --prompt "the cat gets up" --ulysses-degree 2 --ring-degree 2
"""

import sys

from omni_sp.cli import example

if __name__ == "__main__":
    sys.exit(
        example(
            "Draw a video that begins with a picture, over several ranks.",
            model="Wan-AI/Wan2.2-I2V-A14B-Diffusers",
            needs_image=True,
        )
    )
