"""Runs with adapters, and what two of them that are one training must have in common."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastllava.config import check_config
from fastllava.train import run
from fastllava.train.metrics.log import read_metrics
from fastllava.train.state.shards import read_weights

Left = tuple[list[dict[str, Any]], dict[str, torch.Tensor]]
"""Metrics by step, and trained weights by name."""


def trained(values: dict[str, Any]) -> Left:
    """What a run leaves that has ended or stopped."""
    run(check_config(values), Console(quiet=True))
    return left(Path(values["output_dir"]))


def left(out: Path) -> Left:
    """What the run in `out` has left, with the weights of its last checkpoint."""
    last = max(out.glob("checkpoint-*"), key=lambda folder: int(folder.name.partition("-")[2]))
    return read_metrics(out), read_weights(last / "tensors", "weight/")


def assert_near(ours: Left, theirs: Left, tolerance: float = 1e-5) -> None:
    """Losses within `tolerance`, gradient norms within ten times that, each weight within 1e-3 of its norm."""
    for key, wide in (("loss", 1), ("grad_norm", 10)):
        assert [row[key] for row in ours[0]] == pytest.approx([row[key] for row in theirs[0]], rel=wide * tolerance)
    assert ours[1].keys() == theirs[1].keys() != set()
    for name, tensor in theirs[1].items():
        assert (ours[1][name] - tensor).norm() <= 1e-3 * tensor.norm(), name
