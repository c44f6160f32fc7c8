"""`fastllava bench step`: the trainer's own step at full size, on random weights and samples of the true lengths.

A row is one JSON line, of the fields that `bench peers` gives its variants. What lacks memory has a row too: `void` says so.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benches.ceilings import measure_matmul
from benches.models import size_named
from benches.ours import Fastllava, Run, plan_run
from benches.peer_registry import Settings
from benches.peer_rows import OURS, figures, in_words, of_ours, setting
from benches.peer_trials import Trial, attempt, check_device, check_stages, release, weigh
from benches.results import Row, append, finite
from benches.step_profile import profile_step
from benches.timing import seconds_of
from benches.world import world
from fastllava.config import Stage

WARM_UP, FEWEST = 2, 3
"""Steps before the clock, and under it whatever the budget says."""


@dataclass(frozen=True)
class Steps:
    """What to measure."""

    device: torch.device
    sizes: Sequence[str]
    stages: Sequence[Stage]
    samples: int
    """Of a step; 0: 8 on a CPU, 64 on a GPU."""
    seconds: float
    """Budget of the timed steps of one size and stage."""
    layers: int | None = None
    overrides: Sequence[str] = ()
    """key=value words, as for `fastllava train`."""
    profile: Path | None = None

    def check(self) -> None:
        """Raises UserError for what is nothing to measure."""
        check_stages(self.stages)
        check_device(self.device)
        for name in self.sizes:
            size_named(name).with_layers(self.layers)


def bench(steps: Steps, out: Path | None, say: Callable[[str], None]) -> list[Row]:
    """Measure all of it; each row is appended to `out` as soon as it is there. Raises UserError on unknown names and keys."""
    steps.check()
    rows = []
    for size in steps.sizes or (["7b"] if steps.device.type == "cuda" else ["150m"]):
        for stage in steps.stages:
            row = measure_step(steps, size, stage, say)
            rows.append(row)
            say(in_words(row))
            if out is not None:
                append(out, row)
    return rows


def plan_of(steps: Steps, size: str, stage: Stage) -> Run:
    """The run of one size and stage. Raises UserError on keys that are none."""
    on_gpu = steps.device.type == "cuda"
    samples = steps.samples or (64 if on_gpu else 8)
    settings = Settings.of(steps.device, stage, samples)
    train = {"precision": "bf16" if on_gpu else "fp32", "micro_batch_tokens": settings.rows}
    return plan_run(stage, size_named(size).with_layers(steps.layers), train, steps.overrides, samples)


def measure_step(steps: Steps, size: str, stage: Stage, say: Callable[[str], None]) -> Row:
    """The row of one size and stage."""
    device, run, trial = steps.device, plan_of(steps, size, stage), Trial()
    attempt(trial, functools.partial(_measure, trial, run, device, steps.seconds), device)
    ceiling = measure_matmul(device, run.dtype, min(1.0, steps.seconds / 10))
    row = row_of(trial, run, size, ceiling, device) | {"overrides": list(steps.overrides), "host_waits": None, "idle_share": None}
    if steps.profile is not None and trial.void is None:
        found = profile_step(trial.trainer, run.step(0))
        found.write(steps.profile)
        say(f"wrote {steps.profile}: {found.in_words()}")
        row |= {"host_waits": found.host_waits, "idle_share": found.idle_share}
    trial.trainer = None
    release(device)
    return row


def _measure(trial: Trial, run: Run, device: torch.device, seconds: float) -> None:
    trainer = trial.trainer = Fastllava(run, device)
    trial.loss, trial.norm, trial.peak = weigh(trainer, run.step(0), device)
    for index in range(WARM_UP if device.type == "cuda" else 0):
        trainer.step(trainer.batches(run.step(index)))
    began = time.perf_counter()
    while len(trial.taken) < FEWEST or (time.perf_counter() - began) * (1 + 1 / len(trial.taken)) <= seconds:
        batches = trainer.batches(run.step(len(trial.taken)))
        trial.taken.append(seconds_of(functools.partial(trainer.step, batches), device))
    trial.check_finite()


def row_of(trial: Trial, run: Run, size: str, ceiling: float, device: torch.device) -> Row:
    """One line of results; figures that cannot be said are None."""
    taken: list[float] | None = trial.taken if trial.void is None else None
    steps = [run.step(index) for index in range(len(taken or ()))]
    done = sum(run.accounting.hardware_flops(run.work(step)).total for step in steps)
    ours: dict[str, Any] = of_ours(run, trial.trainer)
    return (
        {"variant": OURS}
        | setting(run, size)
        | figures(run, steps, taken, done or None, ceiling, device)
        | {"peak_bytes": trial.peak if taken else None, "loss": finite(trial.loss), "grad_norm": finite(trial.norm)}
        | {"micro_batches": len(run.step(0).micro_batches)}
        | ours
        | {"void": trial.void}
        | world(device)
    )
