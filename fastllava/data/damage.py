"""Damage that a file's own structure shows, found without decoding it: cut ends, wrong checksums, impossible marks.

Pillow decodes many such files without a word: it fills what is missing, and looks at a PNG's checksums only where it must.
"""

import re
import zlib

from fastllava.data.checks import BadRecord

_RESTORE = "restore the file"
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""The next marker behind a JPEG scan: 0xFF is data before a zero, and so are restart marks; before another one it fills."""
_EOI, _SOS, _TEM = 0xD9, 0xDA, 0x01
_JPEG_MARKERS = frozenset([_TEM, *range(0xC0, 0xDE), *range(0xE0, 0xF0), 0xFE])
"""Those that libjpeg knows; it gives up at others."""
_ZEROS, _ZERO_SHARE = 256, 8
"""WebP: a scan that ends in this many zeros, and in more than one zero for so many bytes, has been overwritten. A plain white picture's
ends in zeros too, one for 19 bytes."""


def check_structure(data: bytes, form: str) -> None:
    """Raises BadRecord when `data`, a file that Pillow calls `form`, is cut short or damaged. Bytes after its end are fine."""
    _CHECKS[form](data)


def _jpeg(data: bytes) -> None:
    """The first picture of the file: from mark to mark to the end mark. Source: libjpeg's next_marker and skip_variable."""
    at, scanned = 2, False
    while (at := data.find(b"\xff", at)) >= 0:
        while data[at : at + 1] == b"\xff":
            at += 1
        marker = int.from_bytes(data[at : at + 1] or b"\0")
        at += 1
        if marker == 0 or marker == _TEM or 0xD0 <= marker <= 0xD7:
            continue
        if marker == _EOI:
            if not scanned:
                raise BadRecord("image_damaged", f"the JPEG ends before its picture begins; {_RESTORE}")
            return
        if marker not in _JPEG_MARKERS:
            raise BadRecord("image_damaged", f"the JPEG has the impossible mark {marker:#04x} at byte {at - 1:,}; {_RESTORE}")
        length = int.from_bytes(data[at : at + 2])
        if length < 2:
            break
        at += length
        if marker == _SOS:
            scanned = True
            found = _AFTER_SCAN.search(data, at)
            if found is None:
                break
            at = found.start()
    raise BadRecord("image_truncated", f"the JPEG has no end mark, so its last part is missing; {_RESTORE}")


def _png(data: bytes) -> None:
    view, at = memoryview(data), 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        kind = data[at + 4 : at + 8]
        if end > len(data):
            break
        if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            raise BadRecord("image_damaged", f"the checksum of the PNG's chunk {kind!r} at byte {at:,} is wrong; {_RESTORE}")
        if kind == b"IEND":
            return
        at = end
    raise BadRecord("image_truncated", f"the PNG has no end chunk, so its last part is missing; {_RESTORE}")


def _gif(data: bytes) -> None:
    """The first frame's blocks, and that something of a GIF follows them, or nothing at all."""
    colours = 3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0
    at = 13 + colours
    try:
        while data[at] == 0x21:
            at = _sub_blocks(data, at + 2)
        if data[at] != 0x2C:
            raise BadRecord("image_damaged", f"the GIF has no picture at byte {at:,}; {_RESTORE}")
        flags = data[at + 9]
        at = _sub_blocks(data, at + 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0))
    except IndexError:
        raise BadRecord("image_truncated", f"the GIF ends within its first picture; {_RESTORE}") from None
    if at < len(data) and data[at] not in b"\x21\x2c\x3b":
        raise BadRecord("image_damaged", f"what follows the GIF's first picture is none of its blocks; {_RESTORE}")


def _sub_blocks(data: bytes, at: int) -> int:
    while data[at]:
        at += data[at] + 1
    return at + 1


def _webp(data: bytes) -> None:
    end, at = int.from_bytes(data[4:8], "little") + 8, 12
    # A missing byte of padding is no loss.
    if end > len(data) + 1:
        raise BadRecord("image_truncated", f"the WebP should have {end:,} bytes and has {len(data):,}; {_RESTORE}")
    while at + 8 <= end:
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        body = data[at + 8 : at + 8 + size]
        if len(body) < size:
            raise BadRecord("image_truncated", f"the WebP ends within its part {data[at : at + 4]!r}; {_RESTORE}")
        zeros = size - len(body.rstrip(b"\0"))
        if data[at : at + 4] == b"VP8 " and zeros > _ZEROS and zeros * _ZERO_SHARE > size:
            raise BadRecord("image_damaged", f"the WebP's last {zeros:,} bytes are zeros; {_RESTORE}")
        at += 8 + size + size % 2


def _bmp(data: bytes) -> None:
    if (end := int.from_bytes(data[2:6], "little")) > len(data):
        raise BadRecord("image_truncated", f"the BMP should have {end:,} bytes and has {len(data):,}; {_RESTORE}")


_CHECKS = {"JPEG": _jpeg, "MPO": _jpeg, "PNG": _png, "GIF": _gif, "WEBP": _webp, "BMP": _bmp}
