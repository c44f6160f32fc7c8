"""How an implementation is judged: by its distance to fp64 truth, of the outputs and of every gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FP64 = torch.float64

Args = tuple[Any, ...]


@dataclass(frozen=True)
class Table:
    """An argument that is computed, not learnt: no implementation owes it a gradient."""

    values: Tensor


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """fp64 normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FP64) * scale


def rounded(value: Any, dtype: torch.dtype, then: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """Floating tensors rounded to `dtype` and kept in `then`, as leaves that take a gradient; the rest as it is.

    fp32 tensors are fp32 by contract (the weights of a loss) and stay so; tables (rope's cos and sin) take no gradient.
    """
    if isinstance(value, Table):
        return value.values.to(dtype).to(then).to(device)
    if isinstance(value, Tensor) and value.dtype == FP64:
        return value.to(dtype).to(then).to(device, copy=True).requires_grad_()
    if isinstance(value, list | tuple):
        return type(value)(rounded(item, dtype, then, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value


def leaves(value: Any) -> list[Tensor]:
    """The tensors in `value` that take a gradient, in order."""
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in leaves(item)]
    return [value] if isinstance(value, Tensor) and value.requires_grad else []


def outputs_and_gradients(function: Callable[..., Any], args: Args) -> list[Tensor]:
    """The outputs, then the gradient of every leaf, for a fixed cotangent; a leaf out of the graph has the gradient None."""
    result = function(*args)
    outs = list(result) if isinstance(result, tuple) else [result]
    cotangents = [draw(*out.shape, seed=99 + i).to(out.dtype).to(out.device) for i, out in enumerate(outs)]
    grads = torch.autograd.grad(outs, leaves(args), cotangents, allow_unused=True)
    return [*outs, *grads]


def distances(got: list[Tensor], truth: list[Tensor]) -> list[float]:
    """Relative distance of each; where truth is nothing or zero, the absolute one."""
    found = []
    for one, true in zip(got, truth, strict=True):
        assert one is not None, "a leaf fell out of the graph"
        true = torch.zeros_like(one, dtype=FP64) if true is None else true
        assert one.shape == true.shape
        one, true = one.double().cpu(), true.double().cpu()
        scale = true.norm().item()
        found.append((one - true).norm().item() / (scale or 1.0))
    return found


def assert_a_kept_graph_repeats(function: Callable[..., Any], args: Args) -> None:
    """Backward through one graph twice gives the same bits, and writes neither to what `function` was given nor to its gradients."""
    before = [x.detach().clone() if isinstance(x, Tensor) else x for x in args]
    out = function(*args)
    outs = out if isinstance(out, tuple) else (out,)
    cotangents = [torch.linspace(-1, 1, one.numel(), device=one.device).view_as(one) for one in outs]
    given = [x.clone() for x in cotangents]
    first = torch.autograd.grad(outs, leaves(args), cotangents, retain_graph=True)
    second = torch.autograd.grad(outs, leaves(args), cotangents)
    same = [*zip(args, before, strict=True), *zip(cotangents, given, strict=True), *zip(first, second, strict=True)]
    assert all(torch.equal(a, b) for a, b in same if isinstance(a, Tensor))
