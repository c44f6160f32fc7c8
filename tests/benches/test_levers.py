"""`fastllava bench levers` on a tiny model, and levers in `bench ablate`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benches import ablate, cli
from benches import levers as bench_levers
from benches.lib.request import Request
from benches.lib.results import Sheet
from fastllava.config.toggles import levers, train_toggles
from fastllava.errors import UserError

KEYS = {
    *("lever", "stage", "size", "layers", "dtype", "samples_per_step", "steps", "loss_first", "loss_last", "lever_loss_last"),
    *("gap_last", "gap_largest", "emulated", "overrides", "void", "device", "versions", "commit", "dirty", "driver", "power_limit_watts"),
}


def test_levers_are_no_toggles() -> None:
    keys = [lever.key for lever in levers()]
    assert keys == ["optim.state", "optim.master", "train.fp8"]
    assert not set(keys) & {toggle.key for toggle in train_toggles()}
    assert not set(keys) & {key for key, _ in ablate.choices(torch.device("cpu"))}
    assert ("optim.state", "8bit") in ablate.choices(torch.device("cpu"), ["optim.state"])


def test_each_lever_stands_beside_the_training_without(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    out = tmp_path / "rows.jsonl"
    options = ["--device", "cpu", "--stages", "finetune", "--steps", "8", "--samples", "2", "--levers", "train.fp8"]
    result = CliRunner().invoke(cli.app, ["levers", *options, "--out", str(out)])
    assert result.exit_code == 0, result.output
    rows: dict[str, dict[str, Any]] = {row["lever"]: row for row in map(json.loads, out.read_text().splitlines())}
    yardstick = rows.pop("train.micro_batch_tokens=1")
    assert yardstick["emulated"] is False
    assert set(rows) == {f"train.fp8={name}" for name in ("tensorwise", "rowwise", "rowwise_with_gw_hp")}
    for row in rows.values():
        assert set(row) == KEYS
        assert row["void"] is None
        assert row["loss_last"] < 0.99 * row["loss_first"], "it learns"
        assert abs(yardstick["gap_largest"]) < abs(row["gap_largest"]) < 3e-3
        assert row["emulated"] is True


def test_a_lever_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"--levers: 'train\.tf32' is none of optim\.state, optim\.master, train\.fp8"):
        bench_levers.bench(Request(torch.device("cpu"), ["tiny"], ["finetune"], 2, 0.0), Sheet(), ["train.tf32"], 4)
