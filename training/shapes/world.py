"""The little world of the demo model: its words, its captions and the ideal drawing of each.

A scene is one coloured shape on a background of another colour.  All lengths are fractions of the picture's side, with
the origin at the top left, x to the right and y down; so a scene can be drawn at any resolution.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

__all__ = [
    "COLOURS",
    "PICTURE_SIZE",
    "POSITIONS",
    "SHAPES",
    "SIZES",
    "Scene",
    "coverage",
    "num_captions",
    "random_scene",
    "unit_outline",
]

PICTURE_SIZE = 256

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 60),
    "green": (40, 160, 80),
    "blue": (40, 90, 210),
    "purple": (140, 60, 170),
    "black": (20, 20, 20),
    "white": (240, 240, 240),
}

SHAPES = ("circle", "square", "triangle", "star")

# The radius of the circle; the other shapes are scaled to look as large.
SIZES: dict[str, float] = {"": 0.18, "small": 0.12, "large": 0.25}

_NEAR, _MIDDLE, _FAR = 0.31, 0.5, 0.69
POSITIONS: dict[str, tuple[float, float]] = {
    "": (_MIDDLE, _MIDDLE),
    "on the left": (_NEAR, _MIDDLE),
    "on the right": (_FAR, _MIDDLE),
    "at the top": (_MIDDLE, _NEAR),
    "at the bottom": (_MIDDLE, _FAR),
    "at the top left": (_NEAR, _NEAR),
    "at the top right": (_FAR, _NEAR),
    "at the bottom left": (_NEAR, _FAR),
    "at the bottom right": (_FAR, _FAR),
}

_CAPTIONS = (
    "{a_thing}{position} on {a_background} background",
    "{a_thing} on {a_background} background{comma_position}",
    "{thing}{position}, {background} background",
    "{a_thing}{position_or_middle} of {a_background} background",
)

# How far a random scene's centre may lie from the position named, and how much its radius may differ from the size.
_MAX_OFFSET = 0.01
_MAX_STRETCH = 0.04
# Edges are anti-aliased by drawing at this many times the resolution and averaging.
_OVERSAMPLING = 4


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One coloured shape on a plain background.

    Args:
        shape: One of `SHAPES`.
        colour: The shape's colour, a key of `COLOURS`.
        background: The background's colour, another key of `COLOURS`.
        size: A key of `SIZES`; empty for the ordinary size.
        position: A key of `POSITIONS`; empty for the middle.
        offset: What to add to the position's centre, as fractions of the side.  The caption does not mention it.
        stretch: What to multiply the size's radius with.  The caption does not mention it.

    Raises:
        ValueError: If a word is not in the vocabulary, or both colours are the same.
    """

    shape: str
    colour: str
    background: str
    size: str = ""
    position: str = ""
    offset: tuple[float, float] = (0.0, 0.0)
    stretch: float = 1.0

    def __post_init__(self) -> None:
        vocabulary = (
            ("shape", self.shape, SHAPES),
            ("colour", self.colour, COLOURS),
            ("background", self.background, COLOURS),
            ("size", self.size, SIZES),
            ("position", self.position, POSITIONS),
        )
        for field, word, words in vocabulary:
            if word not in words:
                raise ValueError(f"{field}={word!r} is not one of {list(words)}")
        if self.colour == self.background:
            raise ValueError(f"colour == background == {self.colour!r}: nothing could be seen; choose two colours")

    @property
    def centre(self) -> tuple[float, float]:
        """The middle of the shape's bounding box, (x, y) as fractions of the side."""
        x, y = POSITIONS[self.position]
        return x + self.offset[0], y + self.offset[1]

    @property
    def radius(self) -> float:
        """The scale of the shape's unit outline, as a fraction of the side."""
        return SIZES[self.size] * self.stretch

    def caption(self, variant: int = 0) -> str:
        """Describe the scene in words.

        Args:
            variant: Which of the `num_captions()` paraphrases, 0 is the plainest:
                "a small red circle on the left on a blue background".
        """
        thing = " ".join(word for word in (self.size, self.colour, self.shape) if word)
        return _CAPTIONS[variant].format(
            thing=thing,
            a_thing=_with_article(thing),
            background=self.background,
            a_background=_with_article(self.background),
            position=f" {self.position}" if self.position else "",
            comma_position=f", {self.position}" if self.position else "",
            position_or_middle=f" {self.position or 'in the middle'}",
        )

    def outline(self) -> NDArray[np.float64]:
        """Return the shape's corners, (num_corners, 2) as fractions of the side."""
        outline: NDArray[np.float64] = unit_outline(self.shape) * self.radius + np.array(self.centre)
        return outline

    def draw(self, picture_size: int = PICTURE_SIZE) -> Image.Image:
        """Draw the scene ideally, with smooth edges, as a square RGB picture of `picture_size` pixels."""
        alpha = coverage(self.outline(), picture_size)[..., None]
        shape, background = np.array(COLOURS[self.colour]), np.array(COLOURS[self.background])
        return Image.fromarray(np.rint(alpha * shape + (1 - alpha) * background).astype(np.uint8))


def num_captions() -> int:
    """Return the number of paraphrases that `Scene.caption` knows."""
    return len(_CAPTIONS)


def random_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene at random: shape, size, position and two different colours, each word as likely as another."""
    colour, background = rng.choice(list(COLOURS), size=2, replace=False)
    offset_x, offset_y = rng.uniform(-_MAX_OFFSET, _MAX_OFFSET, size=2)
    return Scene(
        shape=str(rng.choice(SHAPES)),
        colour=str(colour),
        background=str(background),
        size=str(rng.choice(list(SIZES))),
        position=str(rng.choice(list(POSITIONS))),
        offset=(float(offset_x), float(offset_y)),
        stretch=float(rng.uniform(1 - _MAX_STRETCH, 1 + _MAX_STRETCH)),
    )


def unit_outline(shape: str) -> NDArray[np.float64]:
    """Return the corners of a shape of radius 1 whose bounding box has its middle at 0, as (num_corners, 2)."""
    if shape == "circle":
        corners = _corners(radii=[1.0] * 96)
    elif shape == "square":
        half_side = math.sqrt(math.pi) / 2  # the area of the circle
        corners = half_side * np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)])
    elif shape == "triangle":
        corners = _corners(radii=[1.2] * 3)
    elif shape == "star":
        corners = _corners(radii=[1.15, 0.45 * 1.15] * 5)
    else:
        raise ValueError(f"shape={shape!r} is not one of {list(SHAPES)}")
    centred: NDArray[np.float64] = corners - (corners.min(axis=0) + corners.max(axis=0)) / 2
    return centred


def coverage(outline: NDArray[np.float64], picture_size: int) -> NDArray[np.float64]:
    """Return how much of each pixel lies inside an outline.

    Args:
        outline: Corners, (num_corners, 2), as fractions of the side.
        picture_size: The side in pixels.

    Returns:
        (picture_size, picture_size), from 0 (outside) to 1 (inside).
    """
    side = picture_size * _OVERSAMPLING
    mask = Image.new("L", (side, side), 0)
    ImageDraw.Draw(mask).polygon([(float(x), float(y)) for x, y in outline * side - 0.5], fill=255)
    return np.asarray(mask.reduce(_OVERSAMPLING), dtype=np.float64) / 255


def _corners(radii: list[float]) -> NDArray[np.float64]:
    """Return corners at equal angles around 0, beginning at the top, at the given distances."""
    angles = 2 * math.pi * np.arange(len(radii)) / len(radii)
    directions = np.stack([np.sin(angles), -np.cos(angles)], axis=1)
    corners: NDArray[np.float64] = directions * np.array(radii)[:, None]
    return corners


def _with_article(words: str) -> str:
    """Put "a" or "an" before words."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
