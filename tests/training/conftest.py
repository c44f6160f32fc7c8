"""A world small enough to train in seconds, and configs of runs in it."""

from pathlib import Path

import pytest
from small_world import make_world, small_config

from fastllava.config import check_config


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


@pytest.fixture
def config():
    """A config of stage pretrain whose folders are not there."""
    values = {"stage": "pretrain", "output_dir": "o", "model": {"llm": "l", "vision_tower": "v"}, "data": {"records": "r"}}
    return check_config({**values, "optim": {"projector_lr": 0.5, "max_grad_norm": 1.0}, "kernels": "reference"})
