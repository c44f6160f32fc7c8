"""A stage's plan to read, and as one JSON object."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from fastllava.planner.attention import PUBLISHED, implementation_of
from fastllava.planner.plan import Candidate, StagePlan

GIB = 2**30
_BARS = 8


def lines(found: StagePlan) -> Iterator[str]:
    """The plan in words. Every second in it is predicted."""
    config, gpu, plan = found.config, found.gpu, found.plan
    rows = plan.lengths.n_tokens[plan.trained]
    gpus = f"{found.world} x {gpu.name}" if found.world > 1 else f"one {gpu.name}"
    yield f"{config.stage} on {gpus}, {config.train.precision}: predicted, nothing was run on a GPU"
    if config.train.fp8 != "off":
        yield f"  train.fp8      {config.train.fp8} is not foreseen: memory and time are those of bf16 products"
    trained, frozen = found.parameters["trained"], found.parameters["frozen"]
    yield f"  parameters     {trained:,} train, {frozen:,} are frozen"
    supervised = int(plan.lengths.n_supervised[plan.trained].sum()) / int(rows.sum())
    yield f"  samples        {plan.n_samples:,} in {plan.n_steps:,} steps; {rows.mean():.0f} tokens on average, {supervised:.0%} supervised"
    for low, high, share in _histogram(rows):
        yield f"    {low:5d} to {high:5d} tokens  {share:6.1%}  {'#' * round(50 * share)}"
    for candidate in found.candidates:
        mark = "fits" if candidate.fits(gpu) else "too much"
        chosen = "  <- chosen" if candidate is found.chosen else ""
        yield (
            f"  recompute={candidate.recompute:9} micro_batch_tokens={candidate.micro_batch_tokens:5}  "
            f"{candidate.cost.peak / GIB:6.1f} GiB  {candidate.seconds.step:7.2f} s a step  {mark}{chosen}"
        )
    best = found.chosen
    if best is None:
        least = min(found.candidates, key=lambda c: c.cost.peak)
        yield f"  nothing fits into the {gpu.usable / GIB:.1f} GiB of {gpu.name} that tensors can fill; what needs least:"
        yield from _memory(least)
        return
    packed = best.packed
    yield (
        f"  packing        {packed.micro_batches:.1f} micro-batches a step, imbalance {packed.imbalance:.3f}, "
        f"padding {packed.padding_share:.2%}"
    )
    yield f"  memory         {best.cost.peak / GIB:.1f} of {gpu.usable / GIB:.1f} GiB that tensors can fill"
    yield from _memory(best)
    seconds = best.seconds
    yield (
        f"  step           {seconds.step:.2f} s: products {seconds.products:.2f}, attention {seconds.attention:.2f}, "
        f"other ops {seconds.traffic:.2f}, optimizer {seconds.optimizer:.2f}, and what is lost between them; MFU {best.mfu:.0%}"
    )
    moved = sorted(best.cost.traffic.items(), key=lambda item: -item[1])
    yield f"    other ops    {', '.join(f'{part} {size / best.cost.moved:.0%}' for part, size in moved)} of their bytes"
    implementation = implementation_of(config.kernels["attention"], gpu)
    yield f"    attention    kernels.attention={implementation}, by {PUBLISHED[implementation, gpu.generation].source}"
    if found.world > 1:
        beside = "beside them" if seconds.communication <= seconds.computing else "longer than they last"
        yield f"                 communication {seconds.communication:.2f} s, {beside}"
    yield f"  whole          {found.hours:.1f} h, {found.gpu_hours:.0f} GPU-hours; checkpoints, evaluation and the first start aside"
    if (evaluations := found.evaluations) is not None:
        hours = evaluations.times * evaluations.seconds / 3600
        yield (
            f"  evaluation     {evaluations.samples:,} held-out samples in {evaluations.seconds:.1f} s, {evaluations.times:,} times: "
            f"{hours:.1f} h more; answers to eval.samples aside"
        )
    yield f"  limited by     {found.limit}"
    yield f"  run it with    train.recompute={best.recompute} train.micro_batch_tokens={best.micro_batch_tokens}"


def as_json(found: StagePlan) -> dict[str, Any]:
    """What `lines` says, for programs: bytes, seconds, hours."""
    best = found.chosen
    return {
        "stage": found.config.stage,
        "gpu": found.gpu.name,
        "world": found.world,
        "predicted": True,
        "parameters": dict(found.parameters),
        "samples": found.plan.n_samples,
        "steps": found.plan.n_steps,
        "tokens": int(found.plan.lengths.n_tokens[found.plan.trained].sum()),
        "usable_bytes": int(found.gpu.usable),
        "candidates": [_candidate(candidate) for candidate in found.candidates],
        "chosen": None if best is None else _candidate(best),
        "hours": found.hours,
        "gpu_hours": found.gpu_hours,
        "evaluations": None if found.evaluations is None else vars(found.evaluations),
        "limit": found.limit,
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "recompute": candidate.recompute,
        "micro_batch_tokens": candidate.micro_batch_tokens,
        "micro_batches": candidate.packed.micro_batches,
        "imbalance": candidate.packed.imbalance,
        "padding_share": candidate.packed.padding_share,
        "memory_bytes": dict(candidate.cost.memory),
        "peak_memory_bytes": candidate.cost.peak,
        "traffic_bytes": dict(candidate.cost.traffic),
        "step_seconds": candidate.seconds.step,
        "seconds": vars(candidate.seconds),
        "mfu": candidate.mfu,
    }


def _memory(candidate: Candidate) -> Iterator[str]:
    for kind, size in sorted(candidate.cost.memory.items(), key=lambda item: -item[1]):
        yield f"    {kind:15} {size / GIB:6.2f} GiB"


def _histogram(rows: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """(from, to, share of the samples) of a few lengths."""
    counts, edges = np.histogram(rows, bins=_BARS, range=(int(rows.min()), max(int(rows.max()), int(rows.min()) + _BARS)))
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        yield int(np.ceil(low)), int(high), count / len(rows)
