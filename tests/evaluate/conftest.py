"""What tests of evaluation share: the recordings of the official evaluation code, for those who have them beside the checkout."""

from pathlib import Path

import pytest

OFFICIAL = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "eval"


@pytest.fixture(scope="session")
def official() -> Path:
    """What the official evaluation code says of files made for it. Skips where it is not."""
    if not OFFICIAL.is_dir():
        pytest.skip(f"no recordings of the official evaluation code at {OFFICIAL}")
    return OFFICIAL
