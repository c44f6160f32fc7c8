"""What a certificate finds: each variant's distance from the truth, and whether it is no larger than it may be.

A variant is judged beside another one that differs in one thing, not against a tolerance: both are measured against the truth, and
the first may be SLACK times as far from it as the second, and FLOOR besides.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastllava.certify.variants import TRUTH, Outcome

SLACK = 1.5
"""Roundings are independent of each other: who rounds each value once more than PyTorch is farther from the truth by a factor of
sqrt(2). Mistakes are not bounded so."""
FLOOR: Mapping[torch.dtype, float] = {torch.bfloat16: 2.0**-8, torch.float32: 1e-5}
"""Distance that is allowed in any case. bf16: the spacing of its numbers, so one rounding of the result and one of a summand.
fp32: what the tests hold packing and transformers to."""
ZERO = 1e-7
"""A gradient smaller than this share of all parameters' together is zero to rounding, and judged by that share."""

LOSS, NORM = "loss", "gradient norm"


@dataclass(frozen=True)
class Comparison:
    """Of two variants that differ in one thing."""

    name: str
    what: str
    judged: str
    beside: str


COMPARISONS = (
    Comparison("whole", "the run as configured beside plain PyTorch on padded batches", "configured", "plain"),
    Comparison("kernels", "the run's kernels beside the reference kernels, both packed", "configured", "packed"),
    Comparison("packing", "packed samples beside one at a time, both with reference kernels", "packed", "single"),
    Comparison("modules", "the trainer's modules, one sample at a time, beside plain PyTorch", "single", "plain"),
)


@dataclass(frozen=True)
class Figures:
    """A gradient g beside the true one t; or a loss or a norm, with `error` alone."""

    norm: float
    """||g||; of a loss or norm its value."""
    error: float
    """||g - t|| / ||t||; of a gradient that is zero, its share of all parameters' gradients."""
    scale: float = 0.0
    """<g, t> / <t, t> - 1: the part of the error that changes the length alone. Roundings average out in it, a wrong factor does not."""
    cosine: float | None = None


@dataclass(frozen=True)
class Judged:
    """One comparison of one parameter (or "loss", or "gradient norm") in one step."""

    comparison: Comparison
    step: int
    name: str
    found: Figures | None
    beside: Figures | None
    allowed: float
    """The largest error that holds."""
    used: float
    """Error over what is allowed, or scale over what is allowed of it, whichever is larger: beyond 1 it fails."""
    problem: str | None
    """What is wrong, in words; None when it holds."""

    @property
    def holds(self) -> bool:
        """Whether it is near enough to the truth."""
        return self.problem is None


def measure(outcome: Outcome, truth: Outcome, device: torch.device) -> dict[str, Figures]:
    """Figures of loss, gradient norm and each gradient that the variant gave, by name."""
    total, norm = _norm(truth.gradients), _norm(outcome.gradients)
    found = {LOSS: _number(outcome.loss, truth.loss), NORM: _number(norm, total)}
    for name, gradient in outcome.gradients.items():
        if name in truth.gradients:
            found[name] = _gradient(gradient, truth.gradients[name], total, device)
        else:
            found[name] = Figures(float(gradient.double().norm()), math.nan)
    return found


def judge(step: int, figures: Mapping[str, Mapping[str, Figures]], truth: Sequence[str], dtype: torch.dtype) -> Iterator[Judged]:
    """Every comparison of one step. `figures` by variant and name; `truth`: the names that have a true gradient."""
    for comparison in COMPARISONS:
        found, beside = figures[comparison.judged], figures[comparison.beside]
        for name in dict.fromkeys([LOSS, NORM, *truth, *found, *beside]):
            true = name in truth or name in (LOSS, NORM)
            yield _judged(comparison, step, name, found.get(name), beside.get(name), true, dtype)


def _judged(
    comparison: Comparison, step: int, name: str, found: Figures | None, beside: Figures | None, true: bool, dtype: torch.dtype
) -> Judged:
    floor = FLOOR[dtype]
    if found is None or beside is None or not true:
        missing = comparison.judged if found is None else comparison.beside if beside is None else TRUTH
        return Judged(comparison, step, name, found, beside, floor, math.inf, f"'{missing}' gives it no gradient")
    allowed = SLACK * beside.error + floor
    used = [found.error / allowed, abs(found.scale) / (SLACK * abs(beside.scale) + floor)]
    worst = math.inf if any(math.isnan(share) for share in used) else max(used)
    problem = None
    # Not `> 1`: what is not a number fails.
    if not worst <= 1:
        problem = f"error {found.error:.2e} and scale {found.scale:+.1e}, where '{comparison.beside}' has {beside.error:.2e} and "
        problem += f"{beside.scale:+.1e}: {worst:.3g} times what is allowed"
    return Judged(comparison, step, name, found, beside, allowed, worst, problem)


def kind_of(name: str) -> tuple[str, str]:
    """What a parameter is, whatever its layer, and its layer's number, perhaps ""."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    kind = re.sub(r"^llm\.(model\.)?(layers\.\d+\.)?", "", name).removesuffix(".weight")
    return kind, layer[1] if layer else ""


def _norm(gradients: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


def _number(found: float, truth: float) -> Figures:
    return Figures(found, abs(found - truth) / abs(truth) if truth else abs(found))


def _gradient(found: Tensor, truth: Tensor, total: float, device: torch.device) -> Figures:
    """In fp64, piece by piece on `device`; `total` is the norm of all true gradients."""
    squares = torch.zeros(4, dtype=torch.float64)
    for ours, true in zip(found.flatten().split(_PIECE), truth.flatten().split(_PIECE), strict=True):
        g, t = ours.to(device).double(), true.to(device).double()
        squares += torch.stack((g @ g, t @ t, g @ t, (g - t) @ (g - t))).cpu()
    found_norm, true_norm, product, error = squares[0].sqrt().item(), squares[1].sqrt().item(), squares[2].item(), squares[3].sqrt().item()
    if not true_norm > ZERO * total:
        return Figures(found_norm, error / total if total else error)
    cosine = product / (found_norm * true_norm) if found_norm else 0.0
    return Figures(found_norm, error / true_norm, product / true_norm**2 - 1, cosine)


_PIECE = 2**24
