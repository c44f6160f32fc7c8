"""The small world, and a config of what is not there."""

import pytest
from small_world import settings, world  # noqa: F401 (fixtures)

from fastllava.config import check_config


@pytest.fixture
def config():
    """A config of stage pretrain whose folders are not there."""
    values = {"stage": "pretrain", "output_dir": "o", "model": {"llm": "l", "vision_tower": "v"}, "data": {"records": "r"}}
    return check_config({**values, "optim": {"projector_lr": 0.5, "max_grad_norm": 1.0}, "kernels": "reference"})
