"""What tests of evaluation share: the recordings of the official evaluation code, and a tiny checkpoint that can be asked."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

OFFICIAL = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "eval"


@pytest.fixture(scope="session")
def official() -> Path:
    """What the official evaluation code says of files made for it. Skips where it is not."""
    if not OFFICIAL.is_dir():
        pytest.skip(f"no recordings of the official evaluation code at {OFFICIAL}")
    return OFFICIAL


@pytest.fixture(scope="session")
def tiny_llava(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of golden/trace/stage2 with tokenizer and tower, as a user would have it."""
    root = tmp_path_factory.mktemp("tiny_llava")
    shutil.copytree(golden / "trace" / "stage2", root / "llava")
    shutil.copytree(golden / "trace" / "clip", root / "clip")
    shutil.copyfile(golden / "tokenizer" / "tokenizer.model", root / "llava" / "tokenizer.model")
    shutil.copyfile(golden / "trace" / "llm" / "tokenizer_config.json", root / "llava" / "tokenizer_config.json")
    return root / "llava"


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[[str, Iterable[Any]], Path]:
    """Write objects as JSON lines into a file below tmp_path."""

    def write(name: str, rows: Iterable[Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
