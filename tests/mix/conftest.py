"""A small world of annotation files, and mixes that are built from it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from annotation_files import lay_out
from rich.console import Console

from fastllava.mix.build import Built, build
from fastllava.mix.config import check_mix
from fastllava.mix.draw import Draw
from fastllava.mix.progress import Working
from fastllava.mix.run import Dropped, Run


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all files and images, not to be changed."""
    root = tmp_path_factory.mktemp("mix")
    lay_out(root)
    return root


@pytest.fixture
def working() -> Working:
    """A display that nobody sees."""
    return Working(Console(quiet=True))


@pytest.fixture
def made(tmp_path: Path, working: Working) -> Callable[..., tuple[list[dict[str, Any]], Built]]:
    """Builds the mix of a mapping; its records and what else it left."""

    def make(given: dict[str, Any], out: str = "out") -> tuple[list[dict[str, Any]], Built]:
        built = build(check_mix({"order": "as_listed", **given}), tmp_path / out, working)
        return json.loads((built.folder / "mix.json").read_text(encoding="utf-8")), built

    return make


@pytest.fixture
def one(made: Callable[..., Any]) -> Callable[..., list[dict[str, Any]]]:
    """The records of a mix of one source, whose images are not looked for."""

    def make(out: str = "out", **source: Any) -> list[dict[str, Any]]:
        return made({"max_bad_share": 1.0, "sources": [{"name": "s", **source}]}, out)[0]

    return make


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A source at work, with nothing to read."""
    with (tmp_path / "dropped.jsonl").open("w") as file:
        started = Run("s", Draw(0, "s"), tmp_path, Dropped("s", file), lambda _: None, None, None)
        yield started
        started.close()
