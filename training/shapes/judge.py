"""Does a picture show the scene that was asked for?

The judge first says what it sees, knowing nothing of the request: each colour is the nearest of all eight, the shape is
the one of the four that overlaps best.  Only then does it compare.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.shapes.world import COLOURS, SHAPES, Scene, coverage, unit_outline

__all__ = ["Verdict", "judge"]

# Positions are 0.19 of the side apart, so a centre nearer than half of that is nearest to the right one.
_MAX_DISTANCE = 0.19 / 2
# Fewer pixels than this share of the picture are no object; the smallest shape covers 0.026.
_MIN_SHARE = 0.005
_NAMES = tuple(COLOURS)
_PALETTE = np.array(list(COLOURS.values()), dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the judge saw, and whether that was asked for.

    Args:
        found_background: The background's colour.
        found_colour: The object's colour; None if there is no object.
        found_shape: The object's shape; None if there is no object.
        background: Whether the background's colour is right.
        colour: Whether the object's colour is right.
        shape: Whether the object's shape is right.
        position: Whether the object's centre is nearer to the position asked for than to any other.
        overlap: Intersection over union of the object and the ideal object of the scene, 0 to 1: shape, size and
            position in one figure.
    """

    found_background: str
    found_colour: str | None
    found_shape: str | None
    background: bool
    colour: bool
    shape: bool
    position: bool
    overlap: float

    @property
    def right(self) -> bool:
        """Whether background, colour and shape are all right."""
        return self.background and self.colour and self.shape


def judge(image: Image.Image, scene: Scene) -> Verdict:
    """Compare a picture with the scene it should show.

    The background is the colour nearest to the median of the border.  The object's colour is the one that most of the
    other pixels are nearest to; its mask are the pixels nearer to that colour than to the background's.  Its shape is
    the one whose ideal drawing, of the mask's area and about the mask's centre, has the best overlap with the mask.

    Args:
        image: A square picture of any size.
        scene: What was asked for.

    Raises:
        ValueError: If the picture is not square.
    """
    if image.width != image.height:
        raise ValueError(f"width == height is needed, but width={image.width} and height={image.height}")
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = int(np.square(_PALETTE - np.median(border, axis=0)).sum(axis=1).argmin())
    distances = np.square(pixels[:, :, None, :] - _PALETTE).sum(axis=3)
    counts = np.bincount(distances.argmin(axis=2).ravel(), minlength=len(_PALETTE))
    counts[background] = 0
    found_background = _NAMES[background]
    if counts.max() < _MIN_SHARE * image.width * image.height:
        return _compare(scene, found_background, None, None, None)
    colour = int(counts.argmax())
    mask = distances[:, :, colour] < distances[:, :, background]
    return _compare(scene, found_background, _NAMES[colour], _nearest_shape(mask), mask)


def _compare(
    scene: Scene,
    found_background: str,
    found_colour: str | None,
    found_shape: str | None,
    mask: NDArray[np.bool_] | None,
) -> Verdict:
    """Compare what was seen with the scene."""
    position, overlap = False, 0.0
    if mask is not None:
        _, centroid = _area_and_centroid(scene.outline())
        position = math.dist(_centre(mask), centroid) < _MAX_DISTANCE
        overlap = _overlap(mask, scene.outline())
    return Verdict(
        found_background=found_background,
        found_colour=found_colour,
        found_shape=found_shape,
        background=found_background == scene.background,
        colour=found_colour == scene.colour,
        shape=found_shape == scene.shape,
        position=position,
        overlap=overlap,
    )


def _nearest_shape(mask: NDArray[np.bool_]) -> str:
    """Return the shape that overlaps best with a mask when it has the mask's area and centre."""
    area, centre = float(mask.mean()), np.array(_centre(mask))
    overlaps = {}
    for shape in SHAPES:
        outline = unit_outline(shape)
        unit_area, unit_centroid = _area_and_centroid(outline)
        overlaps[shape] = _overlap(mask, (outline - unit_centroid) * math.sqrt(area / unit_area) + centre)
    return max(overlaps, key=lambda shape: overlaps[shape])


def _overlap(mask: NDArray[np.bool_], outline: NDArray[np.float64]) -> float:
    """Return the intersection over union of a mask and the inside of an outline."""
    ideal = coverage(outline, len(mask)) >= 0.5
    return float((mask & ideal).sum() / max(1, (mask | ideal).sum()))


def _centre(mask: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the centroid (x, y) of a mask that is not empty, as fractions of the side."""
    y, x = np.nonzero(mask)
    return float((x.mean() + 0.5) / len(mask)), float((y.mean() + 0.5) / len(mask))


def _area_and_centroid(outline: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """Return the area of a polygon and its centroid (x, y), by the shoelace formula."""
    after = np.roll(outline, -1, axis=0)
    cross = outline[:, 0] * after[:, 1] - after[:, 0] * outline[:, 1]
    area = cross.sum() / 2
    return abs(float(area)), ((outline + after) * cross[:, None]).sum(axis=0) / (6 * area)
