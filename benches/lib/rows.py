"""What a row says of a measured step: speed, memory, and distance to the machine's limit."""

from collections.abc import Sequence
from typing import Any

import torch

from benches.lib.ours import Fastllava, Run
from benches.lib.results import Row
from benches.lib.timing import Times, quantiles
from benches.lib.world import world
from fastllava.data.plan import Step
from fastllava.train.metrics.flops import peak_flops

OURS = "fastllava"
ORIGINAL = "original"


def figures(run: Run, steps: Sequence[Step], taken: Sequence[float], trainer: Any, ceiling: float, device: torch.device) -> Row:
    """Speed of `steps` that `trainer` took these seconds for, in shares of the peak and of `ceiling` (TFLOP/s measured).

    None where there is no time, and shares of the peak where the device's peak is not known.
    """
    seconds = sum(taken) or None
    work = [run.work(step) for step in steps]
    needed = sum(run.accounting.model_flops(each).total for each in work)
    done = sum(trainer.hardware_flops(step).total for step in steps) if taken else None
    peak = peak_flops(world(device)["device"])
    times = Times.of([1e3 * each for each in taken]) if taken else None
    return {
        "samples_per_second": seconds and sum(len(step.samples) for step in steps) / seconds,
        "tokens_per_second": seconds and sum(each.rows for each in work) / seconds,
        "mfu": seconds and peak and needed / seconds / peak,
        "hfu": seconds and peak and done and done / seconds / peak,
        "ceiling_share": seconds and needed / seconds / ceiling / 1e12,
        **quantiles("step_ms", times),
        "turns": len(taken),
        "model_flops": needed / len(steps) if steps else None,
        "hardware_flops": done and done / len(steps),
        "matmul_ceiling_tflops": ceiling,
    }


def setting(run: Run, size: str) -> Row:
    """What was run."""
    return {
        "stage": run.config.stage,
        "size": size,
        "layers": run.size.llm.num_hidden_layers,
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


def in_words(row: Row) -> str:
    """Speed and memory."""
    faster = "" if row.get("times_original_p50") is None else f", {row['times_original_p50']:.2f} times the original's recipe"
    return (
        f"{row['samples_per_second']:.3g} samples/s, {row['tokens_per_second']:,.0f} tokens/s, "
        f"{row['ceiling_share']:.0%} of the matmul ceiling, {row['peak_bytes'] / 2**30:.2f} GiB{faster}"
    )
