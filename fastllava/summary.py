"""What a run leaves to read: run_summary.json and the plot of its loss."""

import contextlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

from fastllava.disk import write_json
from fastllava.metrics import read_metrics
from fastllava.spikes import spike_figures
from fastllava.throughput import run_figures

SUMMARY_FILE = "run_summary.json"
LOSS_PLOT = "loss.png"


def write_summary(output_dir: Path, status: str, facts: dict[str, Any], first_step: int, wall_seconds: float) -> dict[str, Any]:
    """Write run_summary.json: `status` (complete, interrupted, failed), the facts given, `run_figures` of the metrics, the world."""
    rows = read_metrics(output_dir)
    summary = {
        "status": status,
        **facts,
        "steps": len(rows),
        "final_loss": rows[-1]["loss"] if rows else None,
        **run_figures(rows, first_step, wall_seconds),
        **spike_figures(rows),
        "versions": versions(),
    }
    write_json(output_dir / SUMMARY_FILE, summary)
    return summary


def versions() -> dict[str, str]:
    """The software and hardware that numbers were made with."""
    found = {}
    for name in ("fastllava", "torch", "transformers", "triton", "pillow", "pyarrow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # triton is for Linux
            found[name] = importlib.metadata.version(name)
    return {
        **found,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def plot_loss(output_dir: Path, title: str) -> Path | None:
    """Draw loss and learning rate over the steps to loss.png; None when there is no step yet."""
    rows = read_metrics(output_dir)
    if not rows:
        return None
    from matplotlib.figure import Figure

    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [row["loss"] for row in rows], color="tab:blue", linewidth=1, label="loss")
    axes.set(xlabel="optimizer step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    rates = axes.twinx()
    rates.plot(steps, [row["lr"] for row in rows], color="tab:grey", linewidth=0.8, linestyle="--")
    rates.set_ylabel("learning rate (dashed)")
    figure.savefig(output_dir / LOSS_PLOT, dpi=120)
    return output_dir / LOSS_PLOT
