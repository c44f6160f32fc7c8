"""What is known of a way to take a step before and while it is timed, and whether it may be timed: only where all give the same."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benches.lib.ours import Fastllava
from benches.lib.results import OUT_OF_MEMORY, first_line
from benches.lib.timing import Call, peak_bytes, seconds_of
from fastllava.data.plan import Step
from fastllava.errors import UserError

FEWEST = 3
"""Turns, whatever the budget says."""
TOLERANCE = {torch.float32: (1e-5, 1e-3), torch.bfloat16: (1e-3, 3e-2)}
"""By dtype: how far from the variants' median a loss and the norm of a gradient may lie, relatively."""


@dataclass
class Trial:
    """What is known of one way to train."""

    trainer: Any = None
    void: str | None = None
    loss: float | None = None
    norm: float | None = None
    peak: int | None = None
    taken: list[float] = field(default_factory=list)
    """Seconds of each turn."""
    losses: list[float] = field(default_factory=list)
    """The loss of each turn."""

    def fail(self, reason: str) -> None:
        """From here on it has no time, and keeps no memory."""
        self.void, self.trainer, self.taken = reason, None, []

    def build(self, build: Callable[..., Any], *args: Any) -> None:
        """Make the trainer."""
        self.trainer = build(*args)

    def start(self, build: Callable[[], Any], step: Step, device: torch.device) -> None:
        """Build the trainer and weigh a step; void where loss or gradient is not finite, for there is nothing to compare it with."""
        self.trainer = build()
        self.loss, self.norm, self.peak = weigh(self.trainer, step, device)
        if not (math.isfinite(self.loss) and math.isfinite(self.norm)):
            self.fail(f"wrong: loss {self.loss}, gradient norm {self.norm}")

    def turn(self, step: Step, device: torch.device, judged: bool = True) -> None:
        """Take one step, timed without what its loader or collator does, and keep its loss."""
        batches = self.trainer.batches(step)
        found: list[Any] = []
        self.taken.append(seconds_of(lambda: found.append(self.trainer.step(batches, judged=judged)), device))
        self.losses.append(found[0].read()[0])


def turns(seconds: float) -> Iterator[int]:
    """Numbers of turns, while one more as long as those before has a place in the budget; at least FEWEST."""
    began, done = time.perf_counter(), 0
    while done < FEWEST or (time.perf_counter() - began) * (done + 1) / done <= seconds:
        yield done
        done += 1


def judge_alone(trial: Trial, step: Step, device: torch.device) -> None:
    """Loss, gradient norm and peak memory of one step. Where memory is short, with half the micro-batch, and half of that."""
    trainer = trial.trainer
    while True:
        try:
            trial.loss, trial.norm, trial.peak = weigh(trainer, step, device)
            return
        except torch.OutOfMemoryError:
            if isinstance(trainer, Fastllava) or trainer.micro_batch == 1:
                raise
            trainer.micro_batch //= 2
            trainer.drop_gradients()
        release(device)


def weigh(trainer: Any, step: Step, device: torch.device) -> tuple[float, float, int]:
    """Loss and gradient norm of a step, and the most bytes that weights, optimizer and the step take at once."""
    batches = trainer.batches(step)
    found: list[Any] = []
    call = Call(lambda _: found.append(trainer.step(batches, judged=True)))
    if device.type == "cuda":
        # What libraries keep from their first call on is no part of a step.
        call.run(None)
    peak = trainer.state_bytes() + peak_bytes(call, device)
    loss, norm = found[-1].read()[:2]
    return loss, norm, peak


def attempt(trial: Trial, device: torch.device, act: Callable[..., Any], *args: Any) -> None:
    """`act(*args)`; a trial that lacks memory or breaks is void, and the rest goes on."""
    try:
        act(*args)
    except torch.OutOfMemoryError:
        trial.fail(OUT_OF_MEMORY)
    except UserError:
        raise
    except Exception as error:
        trial.fail(f"broke: {type(error).__name__}: {first_line(error)}")
    if trial.void is not None:
        release(device)


def agree(trials: Mapping[str, Trial], dtype: torch.dtype) -> None:
    """Make void what is not what most variants give: the loss of every turn and, of the first step, the gradient's norm."""
    loss_tolerance, norm_tolerance = TOLERANCE[dtype]
    alive = {name: trial for name, trial in trials.items() if trial.void is None}
    checks = [("loss", loss_tolerance, {name: trial.loss for name, trial in alive.items()})]
    checks += [("gradient norm", norm_tolerance, {name: trial.norm for name, trial in alive.items()})]
    taken = min((len(trial.losses) for trial in alive.values()), default=0)
    checks += [("loss", loss_tolerance, {name: trial.losses[k] for name, trial in alive.items()}) for k in range(taken)]
    for what, tolerance, found in checks:
        values = {name: value for name, value in found.items() if value is not None}
        common = statistics.median([value for value in values.values() if math.isfinite(value)] or [math.inf])
        for name, value in values.items():
            if not distance(value, common) <= tolerance and trials[name].void is None:
                trials[name].fail(
                    f"wrong: {what} {value:.6g}, where the variants' median is {common:.6g}; allowed is a share of {tolerance:g}"
                )


def distance(value: float, common: float) -> float:
    """Relative; absolute where the common value is zero."""
    return abs(value - common) / (abs(common) or 1.0)


def release(device: torch.device) -> None:
    """Give back what finished or failed work held, so that the next has all the memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
