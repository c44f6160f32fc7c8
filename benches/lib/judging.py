"""Whether a result may be timed at all: its distance to fp64 truth, beside the reference's in the same dtype."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Outputs = list[Tensor]


@dataclass(frozen=True)
class Results:
    """What a call gave: outputs, and the gradient of each leaf (None for one that took no part)."""

    outputs: list[Tensor]
    gradients: list[Tensor | None]


@dataclass(frozen=True)
class Verdict:
    """The output or gradient that lies farthest beyond the reference, as ||got - truth|| / ||truth||."""

    error: float
    reference_error: float
    allowed: bool


def leaves(value: Any) -> list[Tensor]:
    """The tensors in arguments that take a gradient, in order."""
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in leaves(item)]
    return [value] if isinstance(value, Tensor) and value.requires_grad else []


def in_fp64(value: Any) -> Any:
    """The same arguments with floating tensors in fp64, as leaves of their own."""
    if isinstance(value, list | tuple):
        return type(value)(in_fp64(item) for item in value)
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to(torch.float64).requires_grad_(value.requires_grad)
    return value


def as_list(result: Any) -> Outputs:
    """The outputs of an op, whether it has one or several."""
    return list(result) if isinstance(result, tuple) else [result]


def cotangents(outputs: Sequence[Tensor], seed: int = 99) -> list[Tensor]:
    """A random upstream gradient for each output, in its dtype, always the same; the loss's own for a scalar: one."""
    found = []
    for index, out in enumerate(outputs):
        if out.ndim == 0:
            found.append(torch.ones_like(out))
            continue
        generator = torch.Generator(out.device).manual_seed(seed + index)
        found.append(torch.randn(out.shape, device=out.device, generator=generator).to(out.dtype))
    return found


def run(function: Callable[[], Any], wanted: Sequence[Tensor], upstream: Sequence[Tensor] | None = None) -> Results:
    """Outputs and the gradients of `wanted`, from `upstream` or, without it, random cotangents."""
    outputs = as_list(function())
    if not wanted:
        return Results(outputs, [])
    given = cotangents(outputs) if upstream is None else [one.to(out.dtype) for one, out in zip(upstream, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, wanted, given, allow_unused=True)
    return Results([out.detach() for out in outputs], list(gradients))


def distances(got: Sequence[Tensor | None], truth: Sequence[Tensor | None]) -> list[float]:
    """Relative distance of each to truth; absolute where truth is zero, infinite where something is missing or not finite."""
    found = []
    for one, true in zip(got, truth, strict=True):
        if true is None:
            true = torch.zeros((), dtype=torch.float64, device=None if one is None else one.device)
        if one is None:
            found.append(math.inf if true.norm().item() else 0.0)
            continue
        scale = true.norm().item() or 1.0
        distance = (one.double() - true).norm().item() / scale
        found.append(distance if math.isfinite(distance) else math.inf)
    return found


def judge(found: Sequence[float], reference: Sequence[float], slack: float) -> Verdict:
    """The verdict over some outputs and gradients: each may be `slack` farther from truth than the reference's."""
    error, reference_error = max(zip(found, reference, strict=True), key=lambda pair: pair[0] - pair[1] if pair[0] < math.inf else math.inf)
    return Verdict(error, reference_error, allowed=error <= reference_error + slack and error < math.inf)
