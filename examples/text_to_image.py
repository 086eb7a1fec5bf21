"""Draw pictures from text, one picture over several ranks.

python examples/text_to_image.py --prompt "a red circle on a blue background" --ulysses-degree 2 --ring-degree 2
"""

import sys

from omni_sp.cli import text_to_image

if __name__ == "__main__":
    sys.exit(text_to_image())
