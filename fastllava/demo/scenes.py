"""Scenes of one to four equal things in the quarters of a picture: drawn at random, and painted with Pillow."""

import hashlib
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

GRID = 2
CANVAS = 112
"""Side of a painted picture, pixels."""
SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (214, 36, 36),
    "green": (34, 150, 60),
    "blue": (36, 80, 214),
    "yellow": (240, 212, 30),
    "purple": (140, 50, 180),
    "orange": (246, 134, 24),
}
"""RGB of each colour's name, before it is varied a little."""
BACKGROUNDS = {"white": (240, 240, 240), "grey": (150, 150, 150), "black": (25, 25, 25)}
"""RGB of each background's name, before it is varied a little."""
PLACES = ("top left", "top right", "bottom left", "bottom right")
"""The name of each quarter, row by row."""
HELD_OUT_IN = 5
"""One possible scene in so many is kept for the held-out set."""


@dataclass(frozen=True)
class Scene:
    """Things of one shape and one colour. Pictures of one scene differ in shade, size and place within the quarter."""

    shape: str
    colour: str
    places: tuple[int, ...]
    """Indices into PLACES, ascending: the quarters that hold a thing."""
    background: str


def is_held_out(scene: Scene) -> bool:
    """Whether the scene belongs to the held-out fifth of all possible scenes: a property of the scene, so the sets cannot overlap."""
    return hashlib.sha256(repr(scene).encode()).digest()[0] % HELD_OUT_IN == 0


def draw_scene(rng: random.Random, held_out: bool) -> Scene:
    """A random scene from the held-out scenes or from the others. Single things are frequent: only they can be asked for their place."""
    while True:
        count = rng.choices((1, 2, 3, 4), (5, 2, 2, 1))[0]
        places = tuple(sorted(rng.sample(range(len(PLACES)), count)))
        scene = Scene(rng.choice(SHAPES), rng.choice(list(COLOURS)), places, rng.choice(list(BACKGROUNDS)))
        if is_held_out(scene) == held_out:
            return scene


def paint(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene as an RGB picture of CANVAS x CANVAS pixels; `rng` varies shade, size and place in the quarter."""
    image = Image.new("RGB", (CANVAS, CANVAS), _vary(BACKGROUNDS[scene.background], rng))
    pen = ImageDraw.Draw(image)
    side = CANVAS // GRID
    for place in scene.places:
        radius = rng.uniform(0.40, 0.46) * side
        slack = 0.8 * (side / 2 - radius)
        row, column = divmod(place, GRID)
        x = (column + 0.5) * side + rng.uniform(-slack, slack)
        y = (row + 0.5) * side + rng.uniform(-slack, slack)
        _paint_shape(pen, scene.shape, x, y, radius, _vary(COLOURS[scene.colour], rng))
    return image


def _vary(colour: tuple[int, int, int], rng: random.Random) -> tuple[int, ...]:
    return tuple(min(255, max(0, channel + rng.randint(-12, 12))) for channel in colour)


def _paint_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: tuple[int, ...]) -> None:
    """Paint one shape around (x, y); all in pixels."""
    match shape:
        case "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        case "square":
            half = radius * 0.8
            pen.rectangle((x - half, y - half, x + half, y + half), fill=colour)
        case "triangle":
            pen.polygon(_corners(x, y, [radius] * 3), fill=colour)
        case "star":
            pen.polygon(_corners(x, y, [radius, radius * 0.4] * 5), fill=colour)
        case _:
            raise ValueError(f"shape {shape!r} is none of {', '.join(SHAPES)}")


def _corners(x: float, y: float, radii: list[float]) -> list[tuple[float, float]]:
    """Corners around (x, y) at the given distances, the first straight up."""
    turns = [2 * math.pi * index / len(radii) for index in range(len(radii))]
    return [(x + radius * math.sin(turn), y - radius * math.cos(turn)) for radius, turn in zip(radii, turns, strict=True)]
