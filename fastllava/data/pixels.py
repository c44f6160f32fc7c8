"""A tower's pixels from a decoded picture: padded or not, resized, cut out; exactly, without a square of a long side."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastllava.batch import ImageSpec

_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_BAND_PIXELS = 2**24
"""Pixels of a padded square that are in memory at once: 4 bytes each in Pillow."""


def tower_pixels(rgb: Image.Image, policy: Literal["square", "pad"], spec: ImageSpec) -> NDArray[np.uint8]:
    """uint8 [3, size, size] of an RGB picture, as the original's preprocessing makes them before it scales and normalises.

    square: the shorter side becomes `size`, then the centre is cut out; of a spec that does not crop, both sides become `size`.
    pad: first padded to a square with the mean colour, the odd pixel going right or below. Source: llava/train/train.py,
    CLIPImageProcessor of transformers 4.37.2 and SiglipImageProcessor, on Pillow.
    """
    size, resample = spec.size, _RESAMPLE[spec.resample]
    width, height = rgb.size
    if policy == "pad" and width != height:
        rgb = _padded(rgb, size, tuple(int(channel * 255) for channel in spec.mean), resample)
    elif not spec.crops:
        rgb = rgb.resize((size, size), resample)
    else:
        longer = int(size * max(width, height) / min(width, height))
        rgb = rgb.resize((size, longer) if width <= height else (longer, size), resample)
        left, top = (rgb.width - size) // 2, (rgb.height - size) // 2
        rgb = rgb.crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))


def _padded(rgb: Image.Image, size: int, colour: tuple[int, ...], resample: Image.Resampling) -> Image.Image:
    """The picture padded to a square, then resized, bit for bit.

    Pillow resizes along rows first and then along columns, with 8 bits in between. So rows may be resized before those that
    pad are put above and below them, which are of one colour and stay so, and any stretch of rows by itself.
    """
    width, height = rgb.size
    side = max(width, height)
    top, left = (side - height) // 2, (side - width) // 2
    narrow = Image.new("RGB", (size, side), colour)
    rows = max(1, _BAND_PIXELS // side) if left or width < side else height
    for begin in range(0, height, rows):
        end = min(begin + rows, height)
        band = rgb if rows >= height else rgb.crop((0, begin, width, end))
        if width < side:
            wide = Image.new("RGB", (side, end - begin), colour)
            wide.paste(band, (left, 0))
            band = wide
        narrow.paste(band.resize((size, end - begin), resample), (0, top + begin))
    return narrow.resize((size, size), resample)
