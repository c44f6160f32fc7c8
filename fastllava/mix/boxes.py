"""Boxes as LLaVA-1.5 writes them: on the picture padded to a square, as shares of its side, with two decimals at most."""

from typing import NamedTuple


class Box(NamedTuple):
    """Corners from the top left, in pixels or in shares of a side."""

    left: float
    top: float
    right: float
    bottom: float


def within(box: Box, width: float, height: float) -> Box | None:
    """The part of the box that lies in a picture of this size; None where nothing does."""
    left, top = max(0, box.left), max(0, box.top)
    right, bottom = min(width, box.right), min(height, box.bottom)
    return Box(left, top, right, bottom) if left < right and top < bottom else None


def on_padded_square(box: Box, width: int, height: int) -> Box:
    """Pixels to shares of the square that the picture is padded to.

    The picture lies in the middle; of an odd rest the smaller half comes first, as `expand2square` of the original pads
    (llava/mm_utils.py).
    """
    side = max(width, height)
    right_by, down_by = (side - width) // 2, (side - height) // 2
    return Box((box.left + right_by) / side, (box.top + down_by) / side, (box.right + right_by) / side, (box.bottom + down_by) / side)


def on_picture(box: Box, width: int, height: int) -> Box:
    """Pixels to shares of the picture's own sides, for models that see it stretched."""
    return Box(box.left / width, box.top / height, box.right / width, box.bottom / height)


def box_text(shares: Box) -> str:
    """The four shares as the released file writes them: `[0.0, 0.64, 0.3, 0.76]`."""
    return str([round(float(share), 2) for share in shares])
