"""`fastllava bench ablate` on a tiny model: every toggle there is, each against the run as it is."""

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from typer.testing import CliRunner

from benches import ablate, cli
from benches.lib import trials
from benches.lib.request import Request
from benches.lib.results import Sheet
from fastllava.config import TrainConfig
from fastllava.errors import UserError
from fastllava_kernels import rooms

KEYS = {
    *("toggle", "value", "baseline", "stage", "size", "layers", "dtype", "samples_per_step", "turns", "void", "device", "versions"),
    *("commit", "dirty", "driver", "power_limit_watts", "step_ms_p50", "baseline_ms_p50", "delta_ms_p20", "delta_ms_p50", "delta_ms_p80"),
    *("delta_bytes", "loss", "delta_loss", "grad_norm", "delta_grad_norm"),
}


def test_toggles_of_adapters_are_left_out_where_there_are_none() -> None:
    assert ablate._finetune_only(torch.device("cpu")) == ["kernels.lora_linear", "kernels.nf4_linear"]


def test_toggles_are_those_of_rooms_and_config() -> None:
    found = set(ablate.choices(torch.device("cpu")))
    assert found >= {(f"kernels.{name}", each) for name, room in rooms().items() for each in room.implementations}
    assert found >= {("train.recompute", mode) for mode in get_args(TrainConfig.model_fields["recompute"].annotation)}
    assert found >= {("train.compile", "off"), ("train.compile", "layer"), ("train.compile", "step"), ("train.micro_batch_tokens", "1")}
    keys = {key for key, _ in found}
    assert {key.partition(".")[0] for key in keys} <= {"kernels", "train", "optim", "parallel"}
    assert not keys & {"train.precision", "train.loss_norm", "optim.schedule", "train.device"}


def test_each_value_stands_beside_the_run_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    keys = "kernels.masked_linear_cross_entropy,train.recompute,train.micro_batch_tokens"
    options = ["--device", "cpu", "--seconds", "0", "--samples", "2", "--toggles", keys, "--out", str(out)]
    result = CliRunner().invoke(cli.app, ["ablate", *options])
    assert result.exit_code == 0, result.output
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in out.read_text().splitlines():
        row = json.loads(line)
        assert set(row) == KEYS
        rows[row["toggle"], row["value"]] = row
    assert {key for key, _ in rows} == set(keys.split(","))
    recompute = rows["train.recompute", "full"]
    assert recompute["baseline"] == "none"
    assert recompute["turns"] == trials.FEWEST
    assert recompute["delta_bytes"] < 0
    assert recompute["delta_ms_p20"] <= recompute["delta_ms_p50"] <= recompute["delta_ms_p80"]
    for row in rows.values():
        if row["void"] is not None:
            assert row["void"].startswith("cannot run here: ")
            assert row["delta_ms_p50"] is row["delta_loss"] is row["loss"] is None
        else:
            assert abs(row["delta_loss"]) < 1e-5 * row["loss"]
            assert abs(row["delta_grad_norm"]) < 1e-4 * row["grad_norm"]
    assert rows["kernels.masked_linear_cross_entropy", "reference"]["baseline"] == "torch"


def test_a_value_that_breaks_is_void_and_the_command_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weigh = trials.weigh

    def broken(trainer: Any, *rest: Any) -> Any:
        if trainer.run.config.train.recompute == "full":
            raise RuntimeError("it broke")
        return weigh(trainer, *rest)

    monkeypatch.setattr(trials, "weigh", broken)
    words = ["--device", "cpu", "--seconds", "0", "--samples", "2", "--toggles", "train.recompute", "--out", str(tmp_path / "rows.jsonl")]
    assert CliRunner().invoke(cli.app, ["ablate", *words]).exit_code == 1
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["value"]: row["void"] for row in rows}["full"] == "broke: RuntimeError: it broke"


def test_a_value_whose_gradient_is_not_finite_is_void(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(trainer: Any, *rest: Any) -> Any:
        return (1.0, math.inf if trainer.run.config.train.last_layer == "all" else 1.0, 1)

    monkeypatch.setattr(trials, "weigh", broken)
    (row,) = ablate.bench(Request(torch.device("cpu"), ["tiny"], ["pretrain"], 2, 0.0), Sheet(), ["train.last_layer"])
    assert (row["value"], row["void"]) == ("all", "wrong: loss 1.0, gradient norm inf")


def test_the_parts_of_a_room_are_changed_in_a_run_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    weigh, seen = trials.weigh, []

    def watched(trainer: Any, *rest: Any) -> Any:
        seen.append({room: use["implementation"] for room, use in trainer.model.kernels().items() if room in ("projector_mlp", "splice")})
        return weigh(trainer, *rest)

    monkeypatch.setattr(trials, "weigh", watched)
    rows = ablate.bench(Request(torch.device("cpu"), ["tiny"], ["pretrain"], 2, 0.0), Sheet(), ["kernels.projector_mlp", "kernels.splice"])
    ran = {(row["toggle"], row["value"]) for row in rows if row["void"] is None}
    assert ran == {("kernels.projector_mlp", "reference"), ("kernels.splice", "reference")}
    both = {"projector_mlp": "torch", "splice": "torch"}
    assert seen == [both, both | {"projector_mlp": "reference"}, both | {"splice": "reference"}]


def test_unknown_toggles_are_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"--toggles: 'kernels.swigl' is none of kernels\."):
        ablate.bench(Request(torch.device("cpu"), ["tiny"], ["pretrain"], 2, 0.0), Sheet(), ["kernels.swigl"])
