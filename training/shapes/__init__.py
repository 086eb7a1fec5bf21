"""The training program of the demo model "omni-sp/shapes": `python -m training.shapes --output DIR`."""
