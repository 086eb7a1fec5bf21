"""Edit a picture by a prompt, over several ranks.

python examples/image_edit.py --image photo.png --prompt "make it snow" --ulysses-degree 2 --ring-degree 2
"""

import sys

from omni_sp.cli import example

if __name__ == "__main__":
    sys.exit(
        example(
            "Edit a picture by a prompt, over several ranks.",
            model="Qwen/Qwen-Image-Edit",
            needs_image=True,
        )
    )
