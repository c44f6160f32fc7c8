"""What a run leaves to read: run_summary.json and the plot of its loss."""

import contextlib
import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fastllava
from fastllava.disk import described_all, read_json_object, write_json
from fastllava.optim.spikes import spike_figures
from fastllava.train.metrics.log import EVAL_SECONDS, read_evaluations, read_metrics
from fastllava.train.metrics.throughput import Figures, run_figures

SUMMARY_FILE = "run_summary.json"
LOSS_PLOT = "loss.png"
CLOSING_STEPS = 50
"""Last steps whose mean loss stands for the end of a run: one step's loss depends on its samples too much."""


def write_summary(
    output_dir: Path, status: str, facts: dict[str, Any], steps: int, counts: Figures, first_step: int, wall_seconds: float
) -> dict[str, Any]:
    """Write run_summary.json: `status` (complete, interrupted, failed), the facts given, `run_figures` of the metrics, the world.

    `steps` is how many were taken and `counts` what they come to, by the plan: rows of the metrics may have been lost, and the
    rates are those of the rows that are there (`steps_in_metrics`).
    """
    rows = [row for row in read_metrics(output_dir) if row["step"] < steps]
    closing = rows[-CLOSING_STEPS:] if rows and rows[-1]["step"] == steps - 1 else []
    summary = {
        "status": status,
        **facts,
        "steps": steps,
        "steps_in_metrics": len(rows),
        "final_loss": closing[-1]["loss"] if closing else None,
        "closing_loss": sum(row["loss"] for row in closing) / len(closing) if closing else None,
        "closing_steps": len(closing),
        **evaluation_figures([row for row in read_evaluations(output_dir) if row["step"] <= steps]),
        **run_figures(rows, first_step, wall_seconds),
        **counts,
        **spike_figures(rows),
        "versions": versions(),
        "commit": commit_in_words(),
    }
    write_json(output_dir / SUMMARY_FILE, summary)
    return summary


def figures_in_words(summary: Mapping[str, Any]) -> str:
    """Loss and rates of a finished run, as far as its metrics tell."""
    if summary["closing_loss"] is None or not summary["samples_per_second"]:
        return f"{summary['samples']:,} samples; rows of metrics.jsonl are missing, so loss and rates are not told"
    held_out = "" if summary.get("held_out_loss") is None else f"held-out loss {summary['held_out_loss']:.4f}, "
    return (
        f"loss {summary['closing_loss']:.4f} (mean of the last {summary['closing_steps']} steps), {held_out}"
        f"{summary['samples']:,} samples in {summary['step_seconds']:.0f} s, "
        f"{summary['samples_per_second']:.1f} samples/s, {summary['tokens_per_second']:,.0f} tokens/s, goodput {summary['goodput']:.0%}"
    )


def evaluation_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a summary says of a run's evaluations, by their rows of metrics.jsonl: how many, their time, and the last held-out loss."""
    if not rows:
        return {}
    figures = {"evaluations": len(rows), EVAL_SECONDS: sum(row[EVAL_SECONDS] for row in rows)}
    last = next((row for row in reversed(rows) if "held_out_loss" in row), None)
    if last is not None:
        figures |= {"held_out_loss": last["held_out_loss"], "held_out_step": last["step"], "held_out_samples": last["held_out_samples"]}
    return figures


def describe_result(output_dir: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Size and hash of each file of the result, by name below `output_dir`: what a summary holds as `result`."""
    return described_all(output_dir, [file.relative_to(output_dir).as_posix() for file in files])


def damage(output_dir: Path, summary: Mapping[str, Any], only: Container[str] | None = None) -> str | None:
    """What is wrong with the first damaged file of a finished run's result, in words; None when all are as they were written.

    `only` these names or suffixes when given. Summaries of old versions say nothing of the files, and all is taken to be well.
    """
    wanted = summary.get("result")
    if not isinstance(wanted, dict):
        return None
    names = [name for name in sorted(wanted) if only is None or Path(name).suffix in only or name in only]
    there = [name for name in names if (output_dir / name).is_file()]
    found = described_all(output_dir, there)
    for name in names:
        if name not in found:
            return f"{name} is missing"
        if found[name] != wanted[name]:
            return f"{name} is not as it was written"
    return None


def damage_of(folder: Path, only: Container[str]) -> str | None:
    """`damage` of the result that `folder` holds, as its own run_summary.json describes it; None where there is no such summary."""
    try:
        return damage(folder, read_json_object(folder / SUMMARY_FILE), only)
    except (OSError, ValueError):
        return None


def versions() -> dict[str, str]:
    """The software and hardware that numbers were made with."""
    return {
        **versions_of(("fastllava", "torch", "transformers", "triton", "pillow", "pyarrow")),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> tuple[str, bool] | None:
    """The commit of the checkout that this code lies in, and whether a file differs from it; None where it is installed otherwise."""
    git, root = shutil.which("git"), Path(fastllava.__file__).resolve().parents[1]
    if git is None or not (root / ".git").exists():
        return None

    def said(*words: str) -> str:
        return subprocess.run([git, "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=20).stdout.strip()  # noqa: S603

    try:
        return said("rev-parse", "HEAD"), bool(said("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None


def commit_in_words() -> str | None:
    """The commit of this code, with "+changes" where a file differs from it; None where it is not known."""
    found = commit()
    return None if found is None else found[0] + "+changes" * found[1]


def plot_loss(output_dir: Path, title: str) -> Path | None:
    """Draw loss, held-out loss and learning rate over the steps to loss.png; None when there is no step yet."""
    rows = read_metrics(output_dir)
    if not rows:
        return None
    from matplotlib.figure import Figure

    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [row["loss"] for row in rows], color="tab:blue", linewidth=1, label="loss")
    held_out = [row for row in read_evaluations(output_dir) if row.get("held_out_loss") is not None]
    if held_out:
        places, losses = [row["step"] for row in held_out], [row["held_out_loss"] for row in held_out]
        axes.plot(places, losses, color="tab:orange", linewidth=1.5, marker="o", markersize=3, label="held-out loss")
        axes.legend()
    axes.set(xlabel="optimizer step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    rates = axes.twinx()
    rates.plot(steps, [row["lr"] for row in rows], color="tab:grey", linewidth=0.8, linestyle="--")
    rates.set_ylabel("learning rate (dashed)")
    figure.savefig(output_dir / LOSS_PLOT, dpi=120)
    return output_dir / LOSS_PLOT
