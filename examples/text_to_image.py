"""Draw pictures from text, one picture over several ranks.

python examples/text_to_image.py --prompt "a red circle on a blue background" --ulysses-degree 2 --ring-degree 2
"""

import sys

from omni_sp.cli import example

if __name__ == "__main__":
    sys.exit(example("Draw pictures from text, one picture over several ranks."))
