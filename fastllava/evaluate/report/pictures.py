"""Pictures on a page: opened as carefully as for training, made small, and written into the page itself."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from fastllava.config import DataConfig
from fastllava.data.checks import BadRecord
from fastllava.data.images import open_rgb
from fastllava.errors import UserError

LONGEST_SIDE = 320
"""Pixels of the longer side of a picture on a page."""
_LOSSLESS_SIDE = 128
_LIMITS = DataConfig.model_construct()
"""The limits of data.* as they are by default, for pictures that belong to no run."""


@dataclass(frozen=True)
class Picture:
    """A picture of a page, or why there is none."""

    address: Markup | None
    """A data: address."""
    width: int = 0
    height: int = 0
    problem: str = ""


def picture_of(source: Path | bytes, limits: DataConfig = _LIMITS) -> Picture:
    """The image in a file, links followed, or in bytes; one that cannot be shown says why."""
    try:
        return _small(open_rgb(source.resolve() if isinstance(source, Path) else source, limits))
    except (BadRecord, UserError) as problem:
        return Picture(None, problem=getattr(problem, "detail", str(problem)))
    except (OSError, ValueError, RuntimeError) as problem:
        return Picture(None, problem=f"cannot be read ({type(problem).__name__})")


def picture_of_pixels(pixels: NDArray[np.uint8]) -> Picture:
    """The picture of RGB pixels [3, height, width]."""
    return _small(Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))))


def address_of(kind: str, content: bytes) -> Markup:
    """The data: address of an image file, png or jpeg."""
    return Markup(f"data:image/{kind};base64,{base64.b64encode(content).decode()}")  # noqa: S704 (base64)


def _small(image: Image.Image) -> Picture:
    lossless = max(image.size) <= _LOSSLESS_SIDE
    if not lossless:
        image = image.copy()
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    # Neither has what a camera or an editor wrote beside the pixels.
    if lossless:
        image.save(out, "PNG", optimize=True)
    else:
        image.save(out, "JPEG", quality=82, exif=b"", icc_profile=None)
    return Picture(address_of("png" if lossless else "jpeg", out.getvalue()), *image.size)
