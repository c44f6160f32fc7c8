"""The rows of `fastllava bench peers` and `step`: what a measured step says of speed, memory and distance to the machine's limit."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benches.ours import Fastllava, Run
from benches.peer_trials import CANNOT, OUT_OF_MEMORY, Trial, distance
from benches.results import Row, finite
from benches.timing import Times
from benches.world import world
from fastllava.data.plan import Step
from fastllava.train.metrics.flops import peak_flops

OURS = "fastllava"
ORIGINAL = "original"


def figures(
    run: Run, steps: Sequence[Step], taken: Sequence[float] | None, done: float | None, ceiling: float, device: torch.device
) -> Row:
    """Speed of `steps` that took these seconds and `done` operations, in shares of the peak and of `ceiling` (TFLOP/s measured).

    None where there is no time, and shares of the peak where the device's peak is not known.
    """
    seconds = sum(taken) if taken else None
    work = [run.work(step) for step in steps]
    needed = sum(run.accounting.model_flops(each).total for each in work)
    peak = peak_flops(world(device)["device"])
    times = Times.of([1e3 * each for each in taken]) if taken else None
    return {
        "samples_per_second": seconds and sum(len(step.samples) for step in steps) / seconds,
        "tokens_per_second": seconds and sum(each.rows for each in work) / seconds,
        "mfu": seconds and peak and needed / seconds / peak,
        "hfu": seconds and peak and done and done / seconds / peak,
        "ceiling_share": seconds and needed / seconds / ceiling / 1e12,
        "step_ms_p20": times and times.p20,
        "step_ms_p50": times and times.p50,
        "step_ms_p80": times and times.p80,
        "turns": len(steps) if taken else 0,
        "model_flops": needed / len(steps) if steps else None,
        "hardware_flops": done and done / len(steps),
        "matmul_ceiling_tflops": ceiling,
    }


def setting(run: Run, size: str) -> Row:
    """What was run."""
    return {
        "stage": run.config.stage,
        "size": size,
        "layers": run.size.llama.num_hidden_layers,
        "dtype": run.config.train.precision,
        "samples_per_step": run.plan.train.global_batch,
    }


def of_ours(run: Run, trainer: Fastllava | None) -> Row:
    """What of the configuration decides the speed; the kernels as they were chosen, None where no model came to be."""
    train = run.config.train
    return {
        "micro_batch_tokens": train.micro_batch_tokens,
        "recompute": train.recompute,
        "last_layer": train.last_layer,
        "compile": train.compile,
        "kernels": None if trainer is None else {room: use["implementation"] for room, use in trainer.model.kernels().items()},
    }


NOT_OURS = dict.fromkeys(("micro_batch_tokens", "recompute", "last_layer", "compile", "kernels"))


def row_of(name: str, trials: Mapping[str, Trial], run: Run, steps: Sequence[Step], size: str, ceiling: float, device: torch.device) -> Row:
    """One line of results; figures that cannot be said are None."""
    trial, original = trials[name], trials.get(ORIGINAL)
    timed = trial.void is None
    done = sum(done_flops(trial.trainer, run, step) for step in steps) if timed else None
    faster = _faster(trial, original) if timed and original is not None and original.void is None else None
    alive = [other.loss for other in trials.values() if other.void is None and other.loss is not None]
    return (
        {"variant": name}
        | setting(run, size)
        | figures(run, steps, trial.taken if timed else None, done, ceiling, device)
        | {
            "peak_bytes": trial.peak if timed else None,
            "times_original_p20": faster and faster.p20,
            "times_original_p50": faster and faster.p50,
            "times_original_p80": faster and faster.p80,
            "loss": finite(trial.loss),
            "grad_norm": finite(trial.norm),
            "error": finite(distance(trial.loss, statistics.median(alive))) if alive and trial.loss is not None else None,
            "micro_batch": getattr(trial.trainer, "micro_batch", None),
            "attention": getattr(trial.trainer, "attention", None),
            "padding_share": padding(trial.trainer, run, steps) if timed else None,
        }
        | (of_ours(run, trial.trainer) if name == OURS else NOT_OURS)
        | {"void": trial.void}
        | world(device)
    )


def _faster(trial: Trial, original: Trial) -> Times:
    """Than the original's recipe, turn by turn."""
    return Times.of([theirs / mine for theirs, mine in zip(original.taken, trial.taken, strict=True)])


def done_flops(trainer: Any, run: Run, step: Step) -> float:
    """What a variant computes in a step."""
    if isinstance(trainer, Fastllava):
        return run.accounting.hardware_flops(run.work(step)).total
    return trainer.hardware_flops(step).total


def padding(trainer: Any, run: Run, steps: Sequence[Step]) -> float:
    """Share of the decoder's rows that no sample has."""
    if isinstance(trainer, Fastllava):
        return 0.0
    rows = sum(run.work(step).rows for step in steps)
    return 1 - rows / sum(trainer.rows(step) for step in steps)


def in_words(row: Row) -> str:
    """One line for the screen."""
    begin = f"{row['size']} {row['stage']} {row['variant']}: "
    if row["void"] is not None:
        return begin + f"void, {row['void']}"
    faster = "" if row.get("times_original_p50") is None else f", {row['times_original_p50']:.2f} times the original's recipe"
    return (
        begin + f"{row['samples_per_second']:.3g} samples/s, {row['tokens_per_second']:,.0f} tokens/s, "
        f"{row['ceiling_share']:.0%} of the matmul ceiling, {row['peak_bytes'] / 2**30:.2f} GiB{faster}"
    )


def failures(rows: Sequence[Row]) -> list[Row]:
    """Rows that are wrong or broke: void for a reason that is neither the machine nor its memory."""
    return [row for row in rows if row["void"] and not row["void"].startswith((CANNOT, OUT_OF_MEMORY))]
