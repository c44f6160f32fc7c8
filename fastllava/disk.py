"""What is written is on the disk before anything relies on it."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until the file or folder at `path` is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
