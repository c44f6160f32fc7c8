"""A world small enough to train in seconds, and configs of runs in it."""

from pathlib import Path

import pytest
from small_world import make_world, small_config


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with llm/ (and its tokenizer.model), clip/, images/, captions.json, chats.json (some without an image), texts.json."""
    root = tmp_path_factory.mktemp("world")
    make_world(root)
    return root


@pytest.fixture
def settings(world, tmp_path):
    """`settings(stage, **sections)`: a small config of a stage as plain values; sections are merged into it."""

    def make(stage: str = "pretrain", **sections):
        return small_config(world, tmp_path / "run", stage, **sections)

    return make
