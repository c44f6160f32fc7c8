"""Image files: safe paths, checks of every byte before training, and the original's pixels as uint8.

What a file's pixels become (`convert("RGB")` of the original, but for the second row):

| pixels | become |
|---|---|
| RGB, grey, palette, CMYK, 1 bit; EXIF rotation | Pillow's RGB; rotation is not applied |
| 16-bit grey | the high byte, as Pillow reads 16-bit colour (the original saturates: all but the darkest are white) |
| alpha | dropped: the colour below it shows |
| animation | the first frame |
| 32-bit integer, float | refused (`image_mode`): no scale says what white is |
"""

import errno
import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fastllava.batch import ImageSpec
from fastllava.config import DataConfig
from fastllava.data.checks import BadRecord
from fastllava.data.damage import check_structure
from fastllava.data.lookalikes import missing
from fastllava.data.pixels import tower_pixels
from fastllava.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Decoders that are let near a file; Pillow would try some forty, PostScript among them."""
_HEADS = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM")
_CHECKED_WHOLE = ("JPEG", "MPO", "PNG")
"""Formats whose structure shows damage, so that they are not decoded to be sure; MPO is a JPEG with more pictures behind it."""
_ORIENTATION = 0x0112
DIGEST_BYTES = 16
SYSTEMIC = frozenset(
    (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENODEV)
)
"""What no single file is to blame for: a disk or a server that has gone, a limit of the process."""


@dataclass(frozen=True)
class ImageStamp:
    """What tells an image file from another one under its name."""

    size: int
    """Bytes."""
    mtime_ns: int
    """When it was last written. Another time with the same content is the same picture."""
    digest: bytes
    """The first DIGEST_BYTES of its sha256; empty where it was not asked for."""


@dataclass(frozen=True)
class Examined:
    """An image that can be trained on."""

    stamp: ImageStamp
    turned: bool
    """EXIF says to turn or mirror it, which nobody does here."""


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
    """Why the image at `path` cannot be trained on, or None."""
    try:
        examine(path, limits)
    except BadRecord as problem:
        return problem
    return None


def examine(path: Path, limits: DataConfig) -> Examined:
    """What the image at `path`, links followed, is, once its header and every byte have been looked at. Raises BadRecord.

    JPEG and PNG are not decoded: their structure and checksums are followed. The rarer formats are.
    """
    stamp, data = _read(path, limits)
    with _opened(data, limits) as image:
        form = image.format or ""
        turned = _turned(image)
        _check_whole(data, image)
        if form not in _CHECKED_WHOLE:
            _decode(image)
    return Examined(stamp, turned)


def load_image(
    path: Path, policy: Literal["square", "pad"], spec: ImageSpec, limits: DataConfig, expected: ImageStamp | None = None
) -> NDArray[np.uint8]:
    """RGB pixels uint8 [3, size, size] as the original's preprocessing for this tower makes them (`tower_pixels`).

    `expected`: what the file was when the data was prepared; another one is refused, whatever its name, the same one with
    another time is not. Raises ImageError.
    """
    try:
        stamp, data = _read(path, limits, expected, always=limits.image_hashes)
        if expected is not None and stamp.digest and stamp.digest != expected.digest:
            raise BadRecord("image_changed", "is not the picture that was prepared; put that back")
        with _opened(data, limits) as image:
            rgb = _decode(image)
    except BadRecord as problem:
        raise ImageError(path, problem) from None
    return tower_pixels(rgb, policy, spec)


def open_rgb(source: Path | bytes, limits: DataConfig) -> Image.Image:
    """The RGB image in a file, which must be no link, or in bytes, in its own size, for people to look at. Raises BadRecord."""
    if isinstance(source, bytes) and len(source) > limits.max_image_bytes:
        raise BadRecord("image_bytes", f"has {len(source)} bytes; data.max_image_bytes allows 1 to {limits.max_image_bytes}")
    data = source if isinstance(source, bytes) else _read(source, limits)[1]
    with _opened(data, limits) as image:
        return _decode(image)


def read_image(path: Path, limits: DataConfig) -> bytes:
    """The bytes of the image file at `path`, links followed. Raises BadRecord."""
    return _read(Path(os.path.realpath(path)), limits)[1]


def pixels_of(data: bytes, policy: Literal["square", "pad"], spec: ImageSpec, limits: DataConfig) -> NDArray[np.uint8]:
    """Pixels as `load_image` gives them, of the bytes of an image file that nobody has examined. Raises BadRecord when it is damaged."""
    with _opened(data, limits) as image:
        _check_whole(data, image)
        return tower_pixels(_decode(image), policy, spec)


def same_content(path: Path, limits: DataConfig, expected: ImageStamp) -> ImageStamp:
    """The stamp that the file at `path` has now, its content being the `expected` one. Raises BadRecord when it is not."""
    stamp, _ = _read(path, limits, always=True)
    if stamp.digest != expected.digest:
        raise BadRecord("image_changed", "is not the picture that was prepared; put that back")
    return stamp


def _read(path: Path, limits: DataConfig, expected: ImageStamp | None = None, always: bool = True) -> tuple[ImageStamp, bytes]:
    """The file's stamp and bytes; without its digest where size and time are those `expected`, unless `always`. Raises BadRecord."""
    with _open_file(path, limits) as file:
        found = os.fstat(file.fileno())
        try:
            data = file.read(found.st_size + 1)
        except OSError as error:
            if error.errno in SYSTEMIC:
                raise UserError(f"data.images: {path} cannot be read ({_words(error)}); mend that and start again") from None
            raise BadRecord("image_unreadable", f"cannot be read ({_words(error)}); restore the file") from None
    if len(data) != found.st_size:
        raise BadRecord("image_truncated", "changed while it was read; wait until it is complete")
    known = expected is not None and (found.st_size, found.st_mtime_ns) == (expected.size, expected.mtime_ns)
    digest = b"" if known and not always else hashlib.sha256(data).digest()[:DIGEST_BYTES]
    return ImageStamp(found.st_size, found.st_mtime_ns, digest), data


@contextmanager
def _opened(data: bytes, limits: DataConfig) -> Iterator[Image.Image]:
    """The image in `data`, its header read, its bounds checked. Whatever Pillow raises is a BadRecord."""
    with warnings.catch_warnings():
        # Pillow's are about what is checked here: the bound below is tighter than its own, or the user's will.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            begin = data[:12]
            if begin.startswith(_HEADS):
                raise BadRecord("image_unreadable", "the header is broken; restore the file") from None
            raise BadRecord("image_format", f"is no JPEG, PNG, WebP, GIF or BMP (begins with {begin!r}); convert it") from None
        except Image.DecompressionBombError:
            raise BadRecord("image_pixels", "has far too many pixels; shrink it") from None
        except Exception as error:
            raise BadRecord("image_unreadable", f"the header is broken ({_words(error)}); restore the file") from None
        with image:
            _check_bounds(image, limits)
            yield image


@contextmanager
def _open_file(path: Path, limits: DataConfig) -> Iterator[BinaryIO]:
    """The regular file at `path`, opened without waiting for whoever writes a pipe. Raises BadRecord."""
    try:
        found = path.stat()
        _check_file(found, limits)
        # Whoever calls has followed the links that may be followed: a name that has become one since is not.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY)
    except (FileNotFoundError, NotADirectoryError):
        raise BadRecord("image_not_found", missing(path)) from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in SYSTEMIC:
            raise UserError(f"data.images: {path} cannot be opened ({_words(error)}); mend that and start again") from None
        raise BadRecord("image_not_a_file", f"cannot be opened ({_words(error)}); make it readable") from None
    with os.fdopen(handle, "rb") as file:
        # Asked again of what has been opened: the name may mean something else by now.
        _check_file(os.fstat(handle), limits)
        yield file


def _check_file(found: os.stat_result, limits: DataConfig) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise BadRecord("image_not_a_file", "is no regular file; give an image file")
    if not 0 < found.st_size <= limits.max_image_bytes:
        raise BadRecord("image_bytes", f"has {found.st_size} bytes; data.max_image_bytes allows 1 to {limits.max_image_bytes}")


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


def _check_whole(data: bytes, image: Image.Image) -> None:
    """Follow the structure of the file `data`, which Pillow has opened as `image`. Raises BadRecord."""
    try:
        check_structure(data, image.format or "")
    except BadRecord:
        raise
    except Exception as error:
        raise BadRecord("image_damaged", f"is damaged ({_words(error)}); restore the file") from None


def _turned(image: Image.Image) -> bool:
    """Whether EXIF says that the picture is to be turned or mirrored before it is looked at."""
    try:
        return image.getexif().get(_ORIENTATION, 1) in range(2, 9)
    except Exception:
        # Notes beside the picture, which nothing else reads.
        return False


def _decode(image: Image.Image) -> Image.Image:
    """The whole image as RGB. Whatever Pillow raises is a BadRecord."""
    try:
        if image.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        # Pillow would warn about it and then drop it, as here.
        image.info.pop("transparency", None)
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except Image.DecompressionBombError:
        raise BadRecord("image_pixels", "has far too many pixels; shrink it") from None
    except Exception as error:
        raise BadRecord("image_truncated", f"ends early or is damaged ({_words(error)}); restore the file") from None


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
