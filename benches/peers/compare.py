"""`fastllava bench peers`: one training step by fastllava and by what others run, on the same weights and samples.

A row is one JSON line: variant, stage, size, samples and tokens a second, share of the peak and of the matmul ceiling, peak memory, and
the world it was measured in. The variants take turns in one process. What cannot run here, has too little memory, breaks or gives
another loss or gradient than the rest has a row too: `void` says why, and it has no time.
"""

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benches.ceilings import measure_matmul
from benches.lib.ours import Fastllava, Run
from benches.lib.request import Request
from benches.lib.results import CANNOT, Row, Sheet, finite, short_of_memory
from benches.lib.rows import ORIGINAL, OURS, figures, in_words, of_ours, setting
from benches.lib.timing import Times, quantiles
from benches.lib.trials import Trial, agree, attempt, distance, judge_alone, release, turns
from benches.lib.world import world
from benches.peers.original import Original
from benches.peers.training import Peer, Shared
from benches.peers.transformers import Transformers, TransformersLiger, no_liger, no_peft
from fastllava.data.plan import Step
from fastllava.errors import UserError

RESERVE = 12 * 2**30
"""Bytes for what the peers' steps hold beside weights: logits of every token in fp32 and their gradient."""
NOT_OURS = dict.fromkeys(("micro_batch_tokens", "recompute", "last_layer", "compile", "kernels"))


@dataclass(frozen=True)
class Variant:
    """A way to train; `build(run, our trainer, what all share, samples of a micro-batch)` makes its trainer, None stands for ours."""

    summary: str
    build: Callable[[Run, Fastllava, Shared, int], Peer] | None = None
    recomputes: bool = False
    """Whether it can take the larger micro-batch."""
    unsupported: Callable[[torch.device], str | None] = lambda device: None


VARIANTS: Mapping[str, Variant] = {
    ORIGINAL: Variant("the original's recipe as it computes", Original, recomputes=True),
    "transformers": Variant("LlavaForConditionalGeneration, padded, without recomputation", Transformers),
    "transformers_recompute": Variant(
        "the same with recomputation, and larger micro-batches", functools.partial(Transformers, recompute=True), recomputes=True
    ),
    "transformers_liger": Variant("the same without recomputation and with Liger's patch", TransformersLiger, unsupported=no_liger),
    OURS: Variant("ours"),
}
ON_A_CPU = ("original", "transformers", "transformers_liger", OURS)
"""Variants that a CPU is asked for when none is named: a turn of one more takes it minutes."""


def bench(request: Request, sheet: Sheet, variants: Sequence[str] = ()) -> list[Row]:
    """Measure every size and stage, with fewer layers where memory is short for ours; the rows of an attempt are appended together.

    Raises UserError on unknown names and keys.
    """
    request.check()
    for name in variants:
        if name not in VARIANTS:
            raise UserError(f"--variants: '{name}' is none of {', '.join(VARIANTS)}")
    chosen = variants or (list(VARIANTS) if request.on_gpu else ON_A_CPU)
    for size, stage in request.pairs():
        if sheet.has(size=size, stage=stage):
            continue
        for depth in request.depths(size, stage, lambda trained, frozen: 2.0 * trained + RESERVE):
            run = request.run(size, stage, depth)
            if run.config.model.quantize is not None:
                raise UserError(f"model.quantize: {run.config.model.quantize}, and the peers share weights as they are; leave it out")
            sheet.say(f"{size} {stage}: {run.n_steps} different steps of {request.samples} samples on {world(request.device)['device']}")
            rows = list(compare(request, run, size, chosen, sheet))
            for row in rows:
                sheet.add(row, in_words)
            if not any(row["variant"] == OURS and short_of_memory(row) for row in rows):
                break
    return sheet.rows


def compare(request: Request, run: Run, size: str, variants: Sequence[str], sheet: Sheet) -> Iterator[Row]:
    """The rows of one run: every variant is built and judged alone, then they take turns."""
    device = request.device
    trials = start(request, run, variants)
    for name, trial in trials.items():
        if trial.trainer is not None:
            attempt(trial, device, judge_alone, trial, run.step(0), device)
        sheet.say(f"{name}: {trial.void or f'loss {trial.loss:.6f}, gradient norm {trial.norm:.5f}'}")
    agree(trials, run.dtype)
    ceiling = measure_matmul(device, run.dtype, min(1.0, request.seconds / 10))
    steps = take_turns(trials, run, request)
    agree(trials, run.dtype)
    for name in trials:
        yield row_of(name, trials, run, steps, size, ceiling, device)
    trials.clear()
    release(device)


def start(request: Request, run: Run, variants: Sequence[str]) -> dict[str, Trial]:
    """Build every variant that can run here. Ours draws the weights, which are the very same for all, so it is always built."""
    device = request.device
    ours, shared = Trial(), []
    attempt(ours, device, ours.build, Fastllava, run, device)
    trials = {name: ours if name == OURS else Trial() for name in variants}
    if ours.void is None:
        attempt(ours, device, lambda: shared.append(Shared.of(ours.trainer)))
    for name, trial in trials.items():
        variant = VARIANTS[name]
        if variant.build is None:
            continue
        if (reason := variant.unsupported(device) or (no_peft(run) if name.startswith("transformers") else None)) is not None:
            trial.fail(CANNOT + reason)
        elif ours.void is not None:
            trial.fail(f"{ours.void}, where the weights are drawn")
        else:
            micro_batch = request.micro_batch(run.config.stage, variant.recomputes)
            attempt(trial, device, trial.build, variant.build, run, ours.trainer, *shared, micro_batch)
    return trials


def take_turns(trials: Mapping[str, Trial], run: Run, request: Request) -> list[Step]:
    """Every variant the same steps, one after the other, the first in turn another each time; the steps that were taken."""
    steps: list[Step] = []
    alive = [name for name, trial in trials.items() if trial.void is None]
    for turn in turns(request.seconds) if alive else ():
        step = run.step(turn + 1)
        first = turn % len(alive)
        for name in alive[first:] + alive[:first]:
            attempt(trials[name], request.device, trials[name].turn, step, request.device, False)
        steps.append(step)
        alive = [name for name in alive if trials[name].void is None]
        if not alive:
            break
    return steps


def row_of(name: str, trials: Mapping[str, Trial], run: Run, steps: Sequence[Step], size: str, ceiling: float, device: torch.device) -> Row:
    """One line of results; figures that cannot be said are None."""
    trial, original = trials[name], trials.get(ORIGINAL)
    timed = trial.void is None
    faster = _faster(trial, original) if timed and original is not None and original.void is None else None
    alive = [other.loss for other in trials.values() if other.void is None and other.loss is not None]
    return (
        {"variant": name}
        | setting(run, size)
        | figures(run, steps, trial.taken if timed else (), trial.trainer, ceiling, device)
        | {
            "peak_bytes": trial.peak if timed else None,
            **quantiles("times_original", faster),
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
    """How many times as fast as the original's recipe, turn by turn."""
    return Times.of([theirs / mine for theirs, mine in zip(original.taken, trial.taken, strict=True)])


def padding(trainer: Any, run: Run, steps: Sequence[Step]) -> float:
    """The share of the decoder's tokens that no sample has."""
    return 1 - sum(run.work(step).rows for step in steps) / sum(trainer.rows(step) for step in steps)
