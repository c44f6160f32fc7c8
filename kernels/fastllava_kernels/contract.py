"""What every implementation of a room keeps to: its inputs' sizes and dtypes, autocast, which inputs get a gradient, and its accuracy.

`Room` puts every implementation behind its `Contract`, so that all of them answer alike where an input is no good.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fastllava_kernels.op import Op

SLACK = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""How much farther from fp64 truth than the reference in the same dtype an implementation may be: ||got - truth|| / ||truth||."""


def in_autocast(tensor: Tensor) -> bool:
    """Whether `torch.autocast` holds where the tensor lies."""
    kind = tensor.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def outside_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, whose first argument is a tensor, computing inside `torch.autocast` as it does outside: in its inputs' dtypes."""

    @wraps(function)
    def call(first: Tensor, *others: Any) -> Any:
        if not in_autocast(first):
            return function(first, *others)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *others)

    return call


def custom_op(name: str) -> Callable[[Callable[..., Any]], Op]:
    """Make a function the op fastllava::`name`, which writes over no input and computes as outside autocast."""
    return lambda function: Op(name, outside_autocast(function))


class _Apart(torch.autograd.Function):
    """A function whose backward too computes as outside autocast, wherever it is called: what PyTorch differentiates for itself
    would take its products in the autocast of that place. Once differentiable."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], form: TreeSpec, *given: Any) -> Any:
        own = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in given]
        with torch.enable_grad():
            found = function(*tree_unflatten(own, form))
        ctx.own, ctx.found = own, found if isinstance(found, tuple) else (found,)
        detached = tuple(x.detach() for x in ctx.found)
        return detached if isinstance(found, tuple) else detached[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        wanted = [x for x in ctx.own if isinstance(x, Tensor) and x.requires_grad]
        with torch.autocast(gradients[0].device.type, enabled=False):
            found = iter(torch.autograd.grad(ctx.found, wanted, gradients, retain_graph=True, allow_unused=True))
        return None, None, *(next(found) if isinstance(x, Tensor) and x.requires_grad else None for x in ctx.own)


class _Refused(torch.autograd.Function):
    """Return the tensor itself; a gradient of it is an error in words."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, what: str) -> Tensor:
        ctx.what = what
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{ctx.what} gets no gradient; give it detached: {ctx.what.split()[-1]}.detach()")


def _refused(x: Any, what: str) -> Any:
    """`x`, or what is in the sequence x, with an error in place of a gradient."""
    if isinstance(x, list | tuple):
        return [_refused(one, what) for one in x]
    return _Refused.apply(x, what) if isinstance(x, Tensor) and x.requires_grad else x


@dataclass(frozen=True)
class Contract:
    """What a room asks of its inputs, before any implementation sees them."""

    check: Callable[..., None]
    """Raises ValueError, in words, for inputs whose sizes do not fit each other; has the reference's parameters. Reads no values."""
    no_gradient: Sequence[str] = ()
    """Parameters (tensors or sequences of them) that get no gradient; one that is wanted raises RuntimeError in backward, everywhere."""
    one_dtype: bool = True
    """Every floating input is rounded to the first one's dtype, which is the results'. Otherwise the docstring says what is rounded."""
    slack: Mapping[torch.dtype, float] = field(default_factory=lambda: SLACK)
    """The distance to fp64 truth beyond the reference's that is allowed, by dtype."""

    def kept(self, room: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Put `function` behind this contract."""
        names = list(inspect.signature(self.check).parameters)
        places = [(names.index(name), f"{room}: {name}") for name in self.no_gradient]
        outside = outside_autocast(function)

        @wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            if named:
                args = (*args, *(named[name] for name in names[len(args) :]))
            self.check(*args)
            if self.one_dtype:
                args = tuple(_rounded(x, args[0].dtype) for x in args)
            for place, what in places:
                if torch.is_grad_enabled():
                    args = (*args[:place], _refused(args[place], what), *args[place + 1 :])
            if not in_autocast(args[0]):
                return function(*args)
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return outside(*args)
            given, form = tree_flatten(args)
            return _Apart.apply(outside, form, *given)

        return call


def _rounded(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.dtype != dtype and x.is_floating_point() else x


def fits(good: bool, room: str, what: str, *tensors: Tensor) -> None:
    """Raises ValueError that names the room, what its inputs must be, and the shapes of `tensors`, unless `good`."""
    if not good:
        shapes = ", ".join(f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in tensors)
        raise ValueError(f"{room}: {what}; given {shapes}")


def whole(*tensors: Tensor) -> bool:
    """Whether all hold whole numbers, as indices must."""
    return not any(x.is_floating_point() or x.is_complex() or x.dtype is torch.bool for x in tensors)
