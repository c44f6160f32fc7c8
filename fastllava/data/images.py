"""Image files: safe paths, checks that read the header alone, and the original's pixels as uint8.

What a file's pixels become (`convert("RGB")` of the original, but for the second row):

| pixels | become |
|---|---|
| RGB, grey, palette, CMYK, 1 bit; EXIF rotation | Pillow's RGB; rotation is not applied |
| 16-bit grey | the high byte, as Pillow reads 16-bit colour (the original saturates: all but the darkest are white) |
| alpha | dropped: the colour below it shows |
| animation | the first frame |
| 32-bit integer, float | refused (`image_mode`): no scale says what white is |
"""

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fastllava.batch import ImageSpec
from fastllava.config import DataConfig
from fastllava.data.checks import BadRecord
from fastllava.data.lookalikes import missing
from fastllava.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Decoders that are let near a file; Pillow would try some forty, PostScript among them."""
_HEADS = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM")
_TAILS = {"JPEG": b"\xff\xd9", "PNG": b"IEND", "GIF": b";"}
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, OverflowError, MemoryError)
"""What Pillow raises at broken files."""


class ImageError(UserError):
    """An image that cannot be trained on. `reason` is a key of `checks.REASONS`."""

    def __init__(self, path: Path, problem: BadRecord) -> None:
        super().__init__(f"{path}: {problem.detail} ({problem.reason})")
        self.path, self.reason, self.detail = path, problem.reason, problem.detail

    def __reduce__(self) -> tuple[type["ImageError"], tuple[Path, BadRecord]]:
        return ImageError, (self.path, BadRecord(self.reason, self.detail))


def resolve_image(root: Path, relative: str, follow_links: bool = False) -> Path:
    """The file that a record's image path names, inside `root` and nowhere else, links followed. Nothing is opened.

    `follow_links`: links below `root`, which its owner has put there, may lead out of it; `..` in a path may not.
    `root` must be resolved (`Path.resolve`). Raises BadRecord.
    """
    if not relative or "\0" in relative or relative.isspace():
        raise BadRecord("image_path", f"the image path {relative!r} is no path; write one below data.images")
    try:
        relative.encode()
        if relative.startswith("/"):
            raise BadRecord("image_path", f"the image path {relative!r} is absolute; write it as it goes on from data.images")
        inside = f"{root}".rstrip("/") + "/"
        real = os.path.realpath(inside + relative)
    except (UnicodeEncodeError, OSError) as error:
        raise BadRecord("image_path", f"the image path {relative!r} cannot be followed ({type(error).__name__}); mend it") from None
    climbs = ".." in relative.split("/")
    if not real.startswith(inside) and (climbs or not follow_links):
        remedy = "put the file there" if climbs else "put the file there, or write data.follow_links=true if its link is yours"
        raise BadRecord("image_path", f"the image path {relative!r} leads out of data.images; {remedy}")
    return Path(real)


def check_image(path: Path, limits: DataConfig) -> BadRecord | None:
    """Why the image at `path` cannot be trained on, or None. Reads its header and its last bytes.

    Only where those look cut off are the pixels decoded, to be sure.
    """
    try:
        with _open(path, limits) as (file, image):
            if not _ends_well(file, image.format or ""):
                _decode(image)
    except BadRecord as problem:
        return problem
    return None


def load_image(path: Path, policy: Literal["square", "pad"], spec: ImageSpec, limits: DataConfig) -> NDArray[np.uint8]:
    """RGB pixels uint8 [3, size, size] as the original's CLIP preprocessing makes them before it scales and normalises.

    square: the shorter side becomes `size` (bicubic), then the centre is cut out. pad: first padded to a square with
    the mean colour, the odd pixel going right or below. Source: llava/train/train.py and CLIPImageProcessor of
    transformers 4.37.2, on Pillow. Raises ImageError.
    """
    try:
        with _open(path, limits) as (_, image):
            rgb = _decode(image)
    except BadRecord as problem:
        raise ImageError(path, problem) from None
    if policy == "pad":
        rgb = _pad_to_square(rgb, tuple(int(channel * 255) for channel in spec.mean))
    width, height = rgb.size
    shorter, longer = min(width, height), max(width, height)
    longer = int(spec.size * longer / shorter)
    rgb = rgb.resize((spec.size, longer) if width <= height else (longer, spec.size), Image.Resampling.BICUBIC)
    left, top = (rgb.width - spec.size) // 2, (rgb.height - spec.size) // 2
    rgb = rgb.crop((left, top, left + spec.size, top + spec.size))
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))


@contextmanager
def _open(path: Path, limits: DataConfig) -> Iterator[tuple[BinaryIO, Image.Image]]:
    """The file and its image, header read, bounds checked. Raises BadRecord."""
    with _open_file(path, limits) as file:
        try:
            with warnings.catch_warnings():
                # The bound below is the tighter one, or the user's will.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            if (begin := _begin(file)).startswith(_HEADS):
                raise BadRecord("image_unreadable", "the header is broken; restore the file") from None
            raise BadRecord("image_format", f"is no JPEG, PNG, WebP, GIF or BMP (begins with {begin!r}); convert it") from None
        except Image.DecompressionBombError:
            raise BadRecord("image_pixels", "has far too many pixels; shrink it") from None
        except _DECODE_ERRORS as error:
            raise BadRecord("image_unreadable", f"the header is broken ({_words(error)}); restore the file") from None
        with image:
            _check_bounds(image, limits)
            yield file, image


@contextmanager
def _open_file(path: Path, limits: DataConfig) -> Iterator[BinaryIO]:
    """The regular file at `path`, opened without waiting for whoever writes a pipe. Raises BadRecord."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise BadRecord("image_not_a_file", "is no regular file; give an image file")
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise BadRecord("image_not_found", missing(path)) from None
    except (OSError, ValueError) as error:
        raise BadRecord("image_not_a_file", f"cannot be opened ({_words(error)}); make it readable") from None
    with os.fdopen(handle, "rb") as file:
        # Asked again of what has been opened: the name may mean something else by now.
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise BadRecord("image_not_a_file", "is no regular file; give an image file")
        if not 0 < found.st_size <= limits.max_image_bytes:
            raise BadRecord("image_bytes", f"has {found.st_size} bytes; data.max_image_bytes allows 1 to {limits.max_image_bytes}")
        yield file


def _check_bounds(image: Image.Image, limits: DataConfig) -> None:
    width, height = image.size
    size = f"is {width} x {height}"
    if min(width, height) < limits.min_image_side:
        raise BadRecord("image_side", f"{size}; data.min_image_side is {limits.min_image_side}")
    if width * height > limits.max_image_pixels:
        raise BadRecord("image_pixels", f"{size}; data.max_image_pixels is {limits.max_image_pixels}")
    if max(width, height) > limits.max_image_aspect * min(width, height):
        raise BadRecord("image_aspect", f"{size}; data.max_image_aspect is {limits.max_image_aspect:g}")
    if image.mode in ("I", "F"):
        raise BadRecord("image_mode", f"holds pixels of mode {image.mode}, whose white is not said; save it with 8 or 16 bits")


def _ends_well(file: BinaryIO, form: str) -> bool:
    """Whether the last bytes are those of a whole file, trailing zeros aside."""
    position = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 64))
    tail = file.read()
    file.seek(0)
    head = file.read(8)
    file.seek(position)
    if form in ("WEBP", "BMP"):
        said = int.from_bytes(head[4:8], "little") + 8 if form == "WEBP" else int.from_bytes(head[2:6], "little")
        return said <= size
    return _TAILS[form] in tail[-12:] if form == "PNG" else tail.rstrip(b"\0").endswith(_TAILS[form])


def _decode(image: Image.Image) -> Image.Image:
    """The whole image as RGB. Raises BadRecord."""
    try:
        if image.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        # Pillow would warn about it and then drop it, as here.
        image.info.pop("transparency", None)
        return image.convert("RGB")
    except Image.DecompressionBombError:
        raise BadRecord("image_pixels", "has far too many pixels; shrink it") from None
    except _DECODE_ERRORS as error:
        raise BadRecord("image_truncated", f"ends early or is damaged ({_words(error)}); restore the file") from None


def _pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _begin(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read(12)


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
