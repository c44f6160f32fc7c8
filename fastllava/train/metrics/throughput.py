"""What a step did and how fast: the figures of its row in metrics.jsonl, and of the run in its summary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fastllava.data.plan import Plan, Step
from fastllava.train.metrics.flops import Accounting, Work, peak_of

Figures = dict[str, float | int]


@dataclass(frozen=True)
class Throughput:
    """Figures of the steps of one run. `peak` is the dense bf16 peak of one GPU in operations a second; None leaves out mfu and hfu."""

    plan: Plan
    accounting: Accounting
    peak: float | None

    @classmethod
    def of(cls, plan: Plan, accounting: Accounting, device: torch.device) -> "Throughput":
        """The throughput of steps on GPUs such as `device`, or on CPUs."""
        return cls(plan, accounting, peak_of(device))

    def step(self, step: Step, seconds: float, waited: float) -> Figures:
        """The figures of a step that took `seconds`, of which it `waited` for data; the sums are over all ranks.

        tokens: rows that samples have, text and patches. padding_share: of the rows computed, those that no sample has.
        model_flops, hardware_flops: operations the training needs and those this trainer does (`fastllava/train/metrics/flops.py`).
        mfu, hfu: these a second over the peak of all GPUs, data wait included (Chowdhery et al. 2022, appendix B).
        """
        lengths, samples = self.plan.lengths, step.samples
        parts = lengths.n_tokens[samples], lengths.n_images[samples], lengths.n_supervised[samples]
        work = Work.of(*parts)
        needed, done = self.accounting.model_flops(work).total, self.accounting.hardware_flops(work).total
        figures: Figures = {
            "samples": len(samples),
            "tokens": work.rows,
            "supervised_tokens": work.supervised,
            "micro_batches": len(step.micro_batches),
            "padding_share": step.empty / (work.rows + step.empty),
            "model_flops": needed,
            "hardware_flops": done,
            "step_seconds": seconds,
            "data_wait_seconds": waited,
            "samples_per_second": len(samples) / seconds,
            "tokens_per_second": work.rows / seconds,
        }
        if self.peak is not None:
            per_second = self.peak * self.plan.world * seconds
            figures |= {"mfu": needed / per_second, "hfu": done / per_second}
        return figures

    def counts(self, steps: int) -> Figures:
        """samples, tokens and supervised_tokens of the first `steps` steps, by the plan."""
        lengths, parts = self.plan.lengths, self.plan.samples_of(steps)
        return {
            "samples": sum(len(samples) for samples in parts),
            "tokens": sum(int(lengths.n_tokens[samples].sum()) for samples in parts),
            "supervised_tokens": sum(int(lengths.n_supervised[samples].sum()) for samples in parts),
        }


def run_figures(rows: Sequence[Mapping[str, float | int]], first_step: int, wall_seconds: float) -> dict[str, float | int | None]:
    """The figures of a run with these rows of metrics.jsonl, whose present process began at `first_step`, `wall_seconds` ago.

    The sums and rates are those of the steps, waiting for data included. goodput: the share of the process's time that went
    into steps of the result, without waiting for data; set-up and checkpoints are what it lacks besides.
    """
    seconds = sum(row["step_seconds"] for row in rows)
    totals = {key: sum(row[key] for row in rows) for key in ("samples", "tokens", "supervised_tokens")}
    here = [row for row in rows if row["step"] >= first_step]
    figures: dict[str, float | int | None] = {
        **totals,
        "step_seconds": seconds,
        "samples_per_second": totals["samples"] / seconds if seconds else None,
        "tokens_per_second": totals["tokens"] / seconds if seconds else None,
        "data_wait_share": sum(row["data_wait_seconds"] for row in rows) / seconds if seconds else None,
        "wall_seconds": wall_seconds,
        "goodput": sum(row["step_seconds"] - row["data_wait_seconds"] for row in here) / wall_seconds,
    }
    for key in ("mfu", "hfu"):
        if rows and all(key in row for row in rows):
            figures[key] = sum(row[key] * row["step_seconds"] for row in rows) / seconds
    if peaks := [row["peak_memory_bytes"] for row in rows if "peak_memory_bytes" in row]:
        figures["peak_memory_bytes"] = max(peaks)
    return figures
