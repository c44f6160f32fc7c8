"""Loss spikes: a step whose loss or gradient norm lies far above those of the steps before it, found on the device.

The rule is OLMo-core's (`SkipStepOptimizer`): more than 6 standard deviations above the mean of the last 128 steps. Three things
are added. It speaks from the 16th step on, as 128 may be all that a run has. A deviation is at least 1 % of the mean, so that
steps that are all alike make no spike of the next. And a spike is remembered as the bound that it passed: it does not hide the
next one, and what stays high is taken for normal after some steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

WINDOW = 128
"""Steps that are remembered."""
FEWEST = 16
"""Steps before the first that can be a spike."""
SIGMAS = 6.0
"""Standard deviations above the mean from which on a step is a spike."""
_LEAST_SIGMA = 0.01


class Recent:
    """Loss and gradient norm of the last steps."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.full((2, WINDOW), torch.nan, device=device)
        """fp32 [2, WINDOW]: losses, then norms, the newest last; NaN where there was no step yet."""

    def judge(self, now: Tensor) -> tuple[Tensor, Tensor]:
        """How many deviations above the mean a step's loss and norm, fp32 [2], lie, and `values` with this step.

        fp32 [2], 0 while too little is known, and fp32 [2, WINDOW]. Nothing here waits for the device.
        """
        known = ~self.values.isnan()
        count = known.sum(1)
        mean = self.values.nansum(1) / count
        spread = torch.where(known, self.values - mean[:, None], 0.0).square().sum(1) / (count - 1)
        sigma = torch.maximum(spread.sqrt(), _LEAST_SIGMA * mean)
        far = torch.where((count >= FEWEST) & (sigma > 0), (now - mean) / sigma, 0.0)
        kept = torch.where(far > SIGMAS, mean + SIGMAS * sigma, now)
        return far, torch.cat([self.values[:, 1:], kept[:, None]], 1)

    def rows(self) -> list[list[float]]:
        """The pairs of loss and norm, the newest last, exactly. Waits for the device."""
        values = self.values[:, ~self.values[0].isnan()]
        return values.T.tolist()

    def fill(self, rows: Sequence[Sequence[float]]) -> None:
        """Remember what `rows` gave."""
        self.values.fill_(torch.nan)
        if rows:
            self.values[:, -len(rows) :] = torch.tensor(rows, device=self.values.device).T


def recent(optimizer: torch.optim.Optimizer) -> Recent:
    """What belongs to the steps that `optimizer` made: part of a run's state, as its moments are."""
    if not hasattr(optimizer, "recent"):
        device = next(parameter for group in optimizer.param_groups for parameter in group["params"]).device
        optimizer.recent = Recent(device)  # pyright: ignore[reportAttributeAccessIssue] (kept with what it belongs to)
    return optimizer.recent  # pyright: ignore[reportAttributeAccessIssue]


def checked(rows: Any) -> list[list[float]]:
    """`rows` as `Recent.rows` gives them. Raises ValueError when they are not."""
    if not isinstance(rows, list) or len(rows) > WINDOW or not all(isinstance(row, list) and len(row) == 2 for row in rows):
        raise ValueError("'recent' is no list of pairs")
    return [[float(number) for number in row] for row in rows]


def is_spike(far: Sequence[float]) -> bool:
    """Whether a step this far above the mean in loss and norm is one."""
    return max(far) > SIGMAS


def spike_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """The steps that were spikes by a run's rows of metrics.jsonl, and those of them in which nothing moved."""
    spikes = [row for row in rows if "spike" in row]
    return {
        "spike_steps": [row["step"] for row in spikes],
        "skipped_steps": [row["step"] for row in spikes if row["spike"]["skipped"]],
    }


def in_words(step: int, loss: float, norm: float, far: Sequence[float], ids: Sequence[str], skipped: bool) -> str:
    """One line for the screen."""
    done = "skipped: nothing moved" if skipped else "trained on; train.skip_spikes=true in a new output_dir would leave such steps out"
    return (
        f"step {step}: spike: loss {loss:.4f} ({far[0]:+.1f} sigma of the last {WINDOW} steps), gradient norm {norm:.3f} "
        f"({far[1]:+.1f} sigma); {done}; samples {', '.join(ids[:4])}{', ...' if len(ids) > 4 else ''}, all in metrics.jsonl"
    )
