"""A list of checksums as sha256sum writes it, to tell images that have rotted on the disk from those that were given out."""

import os
import re
from pathlib import Path

from fastllava.data.images import DIGEST_BYTES
from fastllava.errors import UserError

_LINE = re.compile(rb"([0-9a-fA-F]{64})[ \t][ *](.+)")


def read_checksums(path: Path) -> dict[str, bytes]:
    """The first DIGEST_BYTES of the sha256 of each path in the list. Raises UserError that names the line."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"data.image_checksums: {path} cannot be read ({error.strerror}); give a list that sha256sum wrote") from None
    listed: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise UserError(f"data.image_checksums: line {number} of {path} is no line of sha256sum: 64 hex digits, two spaces, a path")
        listed[os.path.normpath(os.fsdecode(match[2]))] = bytes.fromhex(match[1].decode())[:DIGEST_BYTES]
    return listed
