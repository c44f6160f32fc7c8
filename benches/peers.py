"""`fastllava bench peers`: one training step by fastllava and by what others run, on the same weights and samples.

A row is one JSON line: variant, stage, size, samples and rows a second, share of the peak and of the matmul ceiling, peak memory, and
the world it was measured in. The variants take turns in one process. What cannot run here, has too little memory, breaks or gives
another loss or gradient than the rest has a row too: `void` says why, and it has no time.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from benches.ceilings import measure_matmul
from benches.models import size_named
from benches.ours import Fastllava, Run, plan_run
from benches.peer_registry import VARIANTS, Settings
from benches.peer_rows import OURS, failures, in_words, row_of
from benches.peer_training import Shared
from benches.peer_trials import CANNOT, Trial, agree, attempt, check_device, check_stages, judge_alone, release
from benches.results import Row, append
from benches.timing import seconds_of
from benches.world import world
from fastllava.config import Stage
from fastllava.data.plan import Step
from fastllava.errors import UserError

__all__ = ["Comparison", "bench", "failures"]

FEWEST = 3
"""Turns, whatever the budget says."""
ON_A_CPU = ["original", "transformers", "transformers_liger", OURS]
"""Variants that a CPU is asked for when none is named: a turn of one more takes it minutes."""


@dataclass(frozen=True)
class Comparison:
    """What to measure."""

    device: torch.device
    sizes: Sequence[str]
    stages: Sequence[Stage]
    variants: Sequence[str]
    precision: str
    samples: int
    """Of a step."""
    seconds: float
    """Budget of the turns of one size and stage, of the clock on the wall."""
    layers: int | None = None
    overrides: Sequence[str] = ()
    """key=value words for fastllava's run."""

    @classmethod
    def of(
        cls, device: torch.device, sizes: Sequence[str], stages: Sequence[str], variants: Sequence[str], samples: int, **others: Any
    ) -> "Comparison":
        """With what suits the device where something is left out."""
        on_gpu = device.type == "cuda"
        return cls(
            device,
            sizes or (["7b"] if on_gpu else ["150m"]),
            cast("Sequence[Stage]", stages),
            variants or (list(VARIANTS) if on_gpu else ON_A_CPU),
            precision="bf16" if on_gpu else "fp32",
            samples=samples or (32 if on_gpu else 4),
            **others,
        )

    def check(self) -> None:
        """Raises UserError for what is nothing to measure."""
        check_stages(self.stages)
        check_device(self.device)
        for name in self.variants:
            if name not in VARIANTS:
                raise UserError(f"--variants: '{name}' is none of {', '.join(VARIANTS)}")
        for name in self.sizes:
            size_named(name).with_layers(self.layers)


def bench(comparison: Comparison, out: Path | None, say: Callable[[str], None]) -> list[Row]:
    """Measure all of it; the rows of a size and stage are appended to `out` together. Raises UserError on unknown names."""
    comparison.check()
    rows = []
    for size in comparison.sizes:
        for stage in comparison.stages:
            for row in compare(comparison, size, stage, say):
                rows.append(row)
                say(in_words(row))
                if out is not None:
                    append(out, row)
    return rows


def compare(comparison: Comparison, size: str, stage: Stage, say: Callable[[str], None]) -> Iterator[Row]:
    """The rows of one size and stage."""
    settings = Settings.of(comparison.device, stage, comparison.samples)
    train = {"precision": comparison.precision, "reference_micro_batch": settings.dealt, "micro_batch_tokens": settings.rows}
    run = plan_run(stage, size_named(size).with_layers(comparison.layers), train, comparison.overrides, comparison.samples)
    say(f"{size} {stage}: {run.n_steps} different steps of {comparison.samples} samples on {world(comparison.device)['device']}")
    trials = start(comparison, run, settings)
    for name, trial in trials.items():
        if trial.trainer is not None:
            attempt(trial, functools.partial(judge_alone, trial, run.step(0), comparison.device), comparison.device)
        say(f"{name}: {trial.void or f'loss {trial.loss:.6f}, gradient norm {trial.norm:.5f}'}")
    agree(trials, run.dtype)
    ceiling = measure_matmul(comparison.device, run.dtype, min(1.0, comparison.seconds / 10))
    steps = take_turns(trials, run, comparison)
    agree(trials, run.dtype)
    for name in trials:
        yield row_of(name, trials, run, steps, size, ceiling, comparison.device)
    trials.clear()
    release(comparison.device)


def start(comparison: Comparison, run: Run, settings: Settings) -> dict[str, Trial]:
    """Build every variant that can run here. Ours draws the weights, which are the very same for all, so it is always built."""
    device = comparison.device
    ours = Trial()
    attempt(ours, functools.partial(_build, ours, Fastllava, run, device), device)
    trials = {name: ours if name == OURS else Trial() for name in comparison.variants}
    shared: list[Shared] = []
    if ours.void is None:
        attempt(ours, lambda: shared.append(Shared.of(ours.trainer)), device)
    for name, trial in trials.items():
        if name == OURS:
            continue
        if (reason := VARIANTS[name].unsupported(device)) is not None:
            trial.fail(CANNOT + reason)
        elif ours.void is not None:
            trial.fail(f"{ours.void}, where the weights are drawn")
        else:
            build = functools.partial(_build, trial, VARIANTS[name].build, run, ours.trainer.model, device, settings, *shared)
            attempt(trial, build, device)
    return trials


def _build(trial: Trial, build: Callable[..., Any], *args: Any) -> None:
    trial.trainer = build(*args)


def take_turns(trials: Mapping[str, Trial], run: Run, comparison: Comparison) -> list[Step]:
    """Every variant the same steps, one after the other, the first in turn another each time; the steps that were taken."""
    steps: list[Step] = []
    began = time.perf_counter()
    alive = [name for name, trial in trials.items() if trial.void is None]
    while alive and (len(steps) < FEWEST or _time_for_another(time.perf_counter() - began, len(steps), comparison.seconds)):
        step = run.step(len(steps) + 1)
        first = len(steps) % len(alive)
        for name in alive[first:] + alive[:first]:
            trial = trials[name]
            attempt(trial, functools.partial(take_turn, trial, step, comparison.device), comparison.device)
        alive = [name for name in alive if trials[name].void is None]
        steps.append(step)
    return steps


def _time_for_another(spent: float, turns: int, budget: float) -> bool:
    return spent * (turns + 1) / turns <= budget


def take_turn(trial: Trial, step: Step, device: torch.device) -> None:
    """One step; what its loader or collator does is not timed."""
    batches = trial.trainer.batches(step)
    found: list[Any] = []
    trial.taken.append(seconds_of(lambda: found.append(trial.trainer.step(batches, judged=False)), device))
    trial.losses.append(found[0].read()[0])
