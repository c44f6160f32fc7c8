"""`fastllava bench step` on tiny models: whole rows, config keys, the profile; and what the results of the peers look like."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benches import cli, report
from benches.lib import ours, trials
from benches.lib import profile as profiling
from fastllava.errors import UserError
from fastllava.planner.sizes import SIZES

CPU = torch.device("cpu")
KEYS = {
    *("variant", "stage", "size", "samples_per_second", "tokens_per_second", "mfu", "hfu", "ceiling_share", "peak_bytes", "device"),
    *("versions", "commit", "dirty", "driver", "power_limit_watts", "layers", "dtype", "samples_per_step", "turns", "void"),
    *("step_ms_p20", "step_ms_p50", "step_ms_p80", "model_flops", "hardware_flops", "matmul_ceiling_tflops", "loss", "grad_norm"),
    *("micro_batches", "micro_batch_tokens", "recompute", "last_layer", "compile", "kernels", "overrides", "host_waits", "idle_share"),
}


def run(tmp_path: Path, *words: str) -> tuple[Any, list[dict[str, Any]]]:
    """The command's result and its rows."""
    out = tmp_path / "rows.jsonl"
    options = ["--device", "cpu", "--sizes", "tiny", "--samples", "4", "--seconds", "0", "--out", str(out)]
    result = CliRunner().invoke(cli.app, ["step", *options, *words])
    return result, [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []


def test_rows_follow_the_config_keys(tmp_path: Path) -> None:
    profile = tmp_path / "deep" / "profile"
    words = ["train.recompute=full", "train.micro_batch_tokens=80", "kernels.swiglu=reference"]
    result, rows = run(tmp_path, "--layers", "1", "--stages", "pretrain", "--profile", str(profile), *words)
    assert result.exit_code == 0, result.output
    (row,) = rows
    assert set(row) == KEYS
    assert (row["variant"], row["stage"], row["size"], row["layers"]) == ("fastllava", "pretrain", "tiny", 1)
    assert (row["recompute"], row["micro_batch_tokens"], row["kernels"]["swiglu"]) == ("full", 80, "reference")
    assert row["micro_batches"] == 4
    assert row["turns"] == trials.FEWEST
    assert row["samples_per_second"] > 0
    assert row["peak_bytes"] > 0
    assert row["hardware_flops"] > row["model_flops"] > 0
    assert row["overrides"] == words
    text = (profile / f"tiny_pretrain_{'_'.join(words).replace('=', '-')}.txt").read_text()
    assert "aten::mm" in text
    assert "host waits: " in text.splitlines()[0]
    assert row["idle_share"] is None


def test_both_stages_by_default_and_recompute_changes_neither_loss_nor_gradient(tmp_path: Path) -> None:
    _, kept = run(tmp_path / "a")
    _, again = run(tmp_path / "b", "train.recompute=full")
    assert [row["stage"] for row in kept] == ["pretrain", "finetune"]
    for one, other in zip(kept, again, strict=True):
        assert (one["loss"], one["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=1e-6)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    for words, said in (
        (["train.recompute=some"], "train.recompute"),
        (["--stages", "align"], "--stages: 'align'"),
        (["--layers", "9"], "--layers"),
    ):
        result, rows = run(tmp_path, *words)
        assert isinstance(result.exception, UserError)
        assert said in str(result.exception)
        assert not rows


def test_want_of_memory_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none_left(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(trials, "weigh", none_left)
    result, rows = run(tmp_path, "--stages", "pretrain")
    assert result.exit_code == 0, result.output
    assert rows[0]["void"] == "out of memory"
    assert rows[0]["samples_per_second"] is rows[0]["peak_bytes"] is None


def test_a_loss_that_is_not_finite_has_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trials, "weigh", lambda *_: (math.nan, 1.0, 1))
    result, rows = run(tmp_path, "--stages", "pretrain")
    assert result.exit_code == 1, result.output
    assert rows[0]["void"] == "wrong: loss nan, gradient norm 1.0"
    assert rows[0]["loss"] is rows[0]["samples_per_second"] is None


def test_host_waits_are_counted() -> None:
    trainer = ours.Fastllava(ours.plan_run("pretrain", SIZES["tiny"], {"precision": "fp32"}, per_step=2), CPU)
    inner = trainer.step

    def waiting(batches: Any) -> Any:
        scalars = inner(batches)
        for _ in range(7):
            torch.ones(3).nonzero()
        return scalars

    trainer.step = waiting
    assert profiling.profile_step(trainer, trainer.run.step(0)).host_waits["aten::nonzero"] == 7


def result_row(variant: str, speed: float, gib: float, void: str | None = None) -> dict[str, Any]:
    """As bench peers writes it."""
    values: dict[str, Any] = {
        "variant": variant,
        "stage": "finetune",
        "size": "150m",
        "layers": 14,
        "dtype": "fp32",
        "samples_per_step": 8,
        "void": void,
        "device": "CPU x",
        "commit": "0123456789abcdef",
        "dirty": False,
        "driver": None,
        "power_limit_watts": None,
        "versions": {"torch": "2.13", "cuda": None},
        "samples_per_second": speed,
        "tokens_per_second": 800 * speed,
        "ceiling_share": 0.1 * speed,
        "mfu": None,
        "step_ms_p20": 7900 / speed,
        "step_ms_p50": 8000 / speed,
        "step_ms_p80": 8100 / speed,
        "peak_bytes": gib * 2**30,
        "times_original_p20": 0.9 * speed,
        "times_original_p50": speed,
        "times_original_p80": 1.1 * speed,
        "padding_share": 0.25,
        "micro_batch": None if variant == "fastllava" else 8,
        "micro_batch_tokens": 2048,
        "matmul_ceiling_tflops": 0.1,
    }
    return values


def test_steps_have_a_table_of_their_own(tmp_path: Path) -> None:
    step_row = {"recompute": "none", "last_layer": "supervised", "compile": "layer", "mfu": 0.5, "hfu": 0.625}
    changes = ({}, {"recompute": "full"}, {"layers": 9, "void": "out of memory"})
    first, other, void = (result_row("fastllava", 2.0, 70.0) | step_row | change for change in changes)
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "step.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (first, other, void, first)))
    text = report.STEP.table(tmp_path)
    assert "| finetune | 150m, 14 layers | none | layer | 2 | 1,600 | 4,000 (3,950 to 4,050) | 20% | 50.0% | 62.5% | 70.00 |" in text
    assert text.count("| finetune |") == 2
    assert "- out of memory: finetune 150m fastllava" in text
    assert "`benches/results/h200/step.jsonl`" in text


def test_table_and_chart_say_what_the_results_say(tmp_path: Path) -> None:
    rows = [
        result_row("original", 1.0, 5.5),
        result_row("transformers_liger", 1.0, 1.0, "cannot run here: no GPU"),
        result_row("fastllava", 2.5, 3.0),
    ]
    (tmp_path / "peers_cpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [result_row("fastllava", 9.0, 9.0), *rows]))
    text = report.PEERS.table(tmp_path)
    assert "| finetune | 150m, 14 layers | original | 1 | - | 800 | 10% | - | 5.50 | 25% | 8 samples |" in text
    assert "| finetune | 150m, 14 layers | **fastllava** | 2.5 | 2.50 (2.25 to 2.75) | 2,000 | 25% | - | 3.00 | 25% |" in text
    assert "| 2,048 tokens |" in text
    # The later row of the same is the one that counts.
    assert "9.00" not in text
    assert "- cannot run here: no GPU: finetune 150m transformers_liger" in text
    assert "commit 012345678;" in text
    (path,) = report.peers_charts(rows, tmp_path / "charts")
    assert path.name == "peers_150m_finetune.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert report.peers_charts(rows[1:2], tmp_path / "none") == []
