"""What a certificate finds: each variant's distance from the truth, and whether it is no larger than it may be.

A variant is judged beside another one that differs in one thing, not against a tolerance: both are measured against the truth, and
the first may be SLACK times as far from it as the second, and FLOOR besides. The part of the distance that changes a gradient's length
alone is judged once more by itself: roundings average out in it, so there a wrong factor of one percent shows in bf16 too.
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
SIGMAS = 3.0
"""So many times 1 / sqrt(n) is allowed, by which the ratio of two norms of n independent roundings each strays. n is limited by a
tensor's entries and by the step's rows too, as each row adds an outer product."""
ZERO = 1e-7
"""A gradient smaller than this share of all parameters' together is zero to rounding, and judged by that share."""

LOSS, ALL = "loss", "all gradients"
_PIECE = 2**24
"""Entries that are made fp64 at a time."""


@dataclass(frozen=True)
class Comparison:
    """A comparison of two variants that differ in one thing."""

    name: str
    what: str
    judged: str
    beside: str


COMPARISONS = (
    Comparison("whole", "the run as configured beside plain PyTorch on padded batches", "configured", "plain"),
    Comparison("kernels", "the run's kernels and levers beside the reference kernels, both packed", "configured", "packed"),
    Comparison("packing", "packed samples beside one at a time, both with reference kernels", "packed", "single"),
    Comparison("modules", "the trainer's modules, one sample at a time, beside plain PyTorch", "single", "plain"),
)


@dataclass(frozen=True)
class Figures:
    """A gradient g beside the true one t; or a loss, with `error` alone."""

    norm: float
    """||g||; of a loss its value."""
    error: float
    """||g - t|| / ||t||; of a gradient that is zero, its share of all parameters' gradients."""
    scale: float = 0.0
    """<g, t> / <t, t> - 1: the part of the error that changes the length alone. Roundings average out in it, a wrong factor does not."""
    cosine: float | None = None
    independent: int = 0
    """Roundings in it that count as independent, the smaller of its entries and the step's supervised rows; 0 for a loss."""

    @property
    def spread(self) -> float:
        """The share by which the errors of two of its like may differ by chance."""
        return SIGMAS / math.sqrt(self.independent) if self.independent else 0.0


@dataclass(frozen=True)
class Judged:
    """One comparison of one parameter (or "loss", or "all gradients") in one step."""

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


def measure(outcome: Outcome, truth: Outcome, supervised: int, device: torch.device) -> dict[str, Figures]:
    """Figures of the loss, of all gradients together and of each that the variant gave, by name. `supervised`: rows of the step."""
    ours, true = outcome.gradients, truth.gradients
    # Zeros stand for a gradient that is not there, without taking memory.
    none = {name: torch.zeros(()).expand_as(gradient) for name, gradient in {**ours, **true}.items()}
    sums = {name: _sums(ours.get(name, zeros), true.get(name, zeros), device) for name, zeros in none.items()}
    total = torch.stack(list(sums.values())).sum(0)
    found = {LOSS: _loss(outcome.loss, truth.loss), ALL: _figures(total, total, supervised)}
    for name, gradient in ours.items():
        independent = min(gradient.numel(), supervised)
        found[name] = _figures(sums[name], total, independent) if name in true else Figures(math.sqrt(sums[name][0]), math.nan)
    return found


def judge(step: int, figures: Mapping[str, Mapping[str, Figures]], truth: Sequence[str], dtype: torch.dtype) -> Iterator[Judged]:
    """Every comparison of one step. `figures` by variant and name; `truth`: the names that have a true gradient."""
    for comparison in COMPARISONS:
        found, beside = figures[comparison.judged], figures[comparison.beside]
        for name in dict.fromkeys([LOSS, ALL, *truth, *found, *beside]):
            true = name in truth or name in (LOSS, ALL)
            yield _judged(comparison, step, name, found.get(name), beside.get(name), true, dtype)


def _judged(
    comparison: Comparison, step: int, name: str, found: Figures | None, beside: Figures | None, true: bool, dtype: torch.dtype
) -> Judged:
    floor = FLOOR[dtype]
    if found is None or beside is None or not true:
        missing = comparison.judged if found is None else comparison.beside if beside is None else TRUTH
        return Judged(comparison, step, name, found, beside, floor, math.inf, f"'{missing}' gives it no gradient")
    allowed = SLACK * (1 + beside.spread) * beside.error + floor
    allowed_scale = SLACK * (abs(beside.scale) + beside.spread * beside.error) + floor
    used = [found.error / allowed, abs(found.scale) / allowed_scale]
    worst = math.inf if any(math.isnan(share) for share in used) else max(used)
    problem = None
    # Not `> 1`: what is not a number fails.
    if not worst <= 1:
        problem = f"error {found.error:.2e} and scale {found.scale:+.1e}, where '{comparison.beside}' has {beside.error:.2e} and "
        problem += f"{beside.scale:+.1e}: {worst:.3g} times what is allowed"
    return Judged(comparison, step, name, found, beside, allowed, worst, problem)


def kind_of(name: str) -> tuple[str, str]:
    """What a parameter is, whatever its layer, and its layer's number, perhaps ""."""
    layer = re.search(r"\.(?:layers|blocks)\.(\d+)\.", name)
    kind = re.sub(r"^llm\.((model|transformer)\.)?((layers|blocks)\.\d+\.)?", "", name).removesuffix(".weight")
    return kind, layer[1] if layer else ""


def _loss(found: float, truth: float) -> Figures:
    return Figures(found, abs(found - truth) / abs(truth) if truth else abs(found))


def _sums(found: Tensor, truth: Tensor, device: torch.device) -> Tensor:
    """fp64 [4] on the host: <g, g>, <t, t>, <g, t> and <g - t, g - t>, piece by piece on `device`."""
    sums = torch.zeros(4, dtype=torch.float64)
    for ours, true in zip(found.flatten().split(_PIECE), truth.flatten().split(_PIECE), strict=True):
        g, t = ours.to(device).double(), true.to(device).double()
        sums += torch.stack((g @ g, t @ t, g @ t, (g - t) @ (g - t))).cpu()
    return sums


def _figures(sums: Tensor, total: Tensor, independent: int) -> Figures:
    """From `_sums` of a gradient, and of all gradients together."""
    found, true, product, error = sums.tolist()
    if not true > ZERO**2 * total[1]:
        return Figures(math.sqrt(found), math.sqrt(error / total[1]) if total[1] else math.sqrt(error), independent=independent)
    cosine = product / math.sqrt(found * true) if found else 0.0
    return Figures(math.sqrt(found), math.sqrt(error / true), product / true - 1, cosine, independent)
