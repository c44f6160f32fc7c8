"""What is known of each variant of `fastllava bench peers`, and whether it may be timed: only where all give the same."""

import gc
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benches.ours import Fastllava
from benches.timing import Call, peak_bytes
from fastllava.config import Stage
from fastllava.data.plan import Step
from fastllava.errors import UserError

STAGES: Sequence[Stage] = ("pretrain", "finetune")
OUT_OF_MEMORY = "out of memory"
CANNOT = "cannot run here: "
TOLERANCE = {torch.float32: (1e-5, 1e-3), torch.bfloat16: (1e-3, 3e-2)}
"""By dtype: how far from the variants' median a loss and the norm of a gradient may lie, relatively."""


@dataclass
class Trial:
    """What is known of a variant."""

    trainer: Any = None
    void: str | None = None
    loss: float | None = None
    norm: float | None = None
    peak: int | None = None
    taken: list[float] = field(default_factory=list)
    """Seconds of each turn."""
    losses: list[float] = field(default_factory=list)
    """Of each turn."""

    def fail(self, reason: str) -> None:
        """No time, and no memory kept."""
        self.void, self.trainer, self.taken = reason, None, []

    def check_finite(self) -> None:
        """A step whose loss or gradient is not finite has no time: who has nothing to compare with looks at this."""
        if self.loss is not None and self.norm is not None and not (math.isfinite(self.loss) and math.isfinite(self.norm)):
            self.fail(f"wrong: loss {self.loss}, gradient norm {self.norm}")


def check_stages(stages: Sequence[str]) -> None:
    """Raises UserError for a name that is no stage."""
    for name in stages:
        if name not in STAGES:
            raise UserError(f"--stages: '{name}' is none of {', '.join(STAGES)}")


def check_device(device: torch.device) -> None:
    """Raises UserError for a GPU that is not there."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: PyTorch finds no CUDA GPU here; write --device cpu")


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


def attempt(trial: Trial, act: Callable[[], None], device: torch.device) -> None:
    """`act()`; a trial that lacks memory or breaks is void, and the rest goes on."""
    try:
        act()
    except torch.OutOfMemoryError:
        trial.fail(OUT_OF_MEMORY)
    except UserError:
        raise
    except Exception as error:
        trial.fail(f"broke: {type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}")
    if trial.void is not None:
        release(device)


def agree(trials: Mapping[str, Trial], dtype: torch.dtype) -> None:
    """Make void what is not what most variants give: the loss of every turn and, of the first step, the gradient's norm."""
    loss_tolerance, norm_tolerance = TOLERANCE[dtype]
    alive = {name: trial for name, trial in trials.items() if trial.void is None}
    checks = [("loss", loss_tolerance, {name: trial.loss for name, trial in alive.items()})]
    checks += [("gradient norm", norm_tolerance, {name: trial.norm for name, trial in alive.items()})]
    turns = min((len(trial.losses) for trial in alive.values()), default=0)
    checks += [("loss", loss_tolerance, {name: trial.losses[k] for name, trial in alive.items()}) for k in range(turns)]
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
    """Give back what finished or failed work held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
