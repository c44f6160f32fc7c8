"""The matrix products of linear layers, and what the micro-batches of one optimizer step share.

Three things differ from what autograd makes of `F.linear(x, weight.to(x.dtype))`; results are the same bits, gradients nearer to exact:

- The gradient of a weight that is kept in fp32 is the product's own fp32 sum, never rounded to the dtype that is computed in.
- Layers that share an input, such as q, k and v, add their parts of its gradient up in the products, without additions of their own.
- Within `accumulation` the gradient of a weight is added to the one that is there by the product itself, and the weight may be cast once
  for all micro-batches. A bf16 gradient that is cast and then added moves 20 bytes a weight and micro-batch, this 8 (Megatron-LM:
  gradient accumulation fusion).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllava_kernels.mm32 import mm32

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`x @ weight.T + bias` of x [..., in], weight [out, in] and bias [out] or None, in some precision; [..., out] in the dtype of x."""

_open: list[dict[Tensor, Tensor] | None] = []
"""The weights' casts, by weight, of each `accumulation` that is going on; None where it holds none."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` in the dtype of x."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@contextmanager
def accumulation(hold: bool = True) -> Iterator[None]:
    """Around forward and backward of an optimizer step's micro-batches: no weight changes, and `.grad` is where gradients add up.

    hold: keep the casts of all weights for as long. What computes nothing again has them all at the end of a forward anyway.
    Hooks of a weight see its first gradient only. `torch.autograd.grad`, which leaves `.grad` alone, has no place in here.
    """
    _open.append({} if hold else None)
    try:
        yield
    finally:
        _open.pop()


def products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """`x @ weight.T + bias` for each weight; x [..., in] in the dtype to compute in, results [..., out] likewise.

    weights: [out, in], biases: [out] or None, as they are kept.
    """
    casts = [_cast(weight, x.dtype) for weight in weights]
    if not torch.is_grad_enabled():
        return tuple(linear(x, cast, bias) for cast, bias in zip(casts, biases, strict=True))
    places = _Backward.apply(x, len(weights), *weights, *casts, *biases)
    return _Forward.apply((x.detach(), casts, biases), *places)  # pyright: ignore[reportReturnType]


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if weight.dtype == dtype:
        return weight
    held = _open[-1] if _open else None
    found = None if held is None else held.get(weight)
    if found is None or found.dtype != dtype:
        found = weight.detach().to(dtype)
        if held is not None:
            held[weight] = found
    return found


class _Forward(torch.autograd.Function):
    """The products; the gradient of each is that of its place.

    Apart from `_Backward`, which keeps what it needs before there is a product: what computes a layer again can stop there.
    """

    @staticmethod
    def forward(ctx: Any, given: Any, *places: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        x, casts, biases = given
        return tuple(linear(x, cast, bias) for cast, bias in zip(casts, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *d_outs: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *d_outs


class _Backward(torch.autograd.Function):
    """A place for each product: of its shape, without memory. Keeps x only where a weight trains."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, *tensors: Any) -> tuple[Tensor, ...]:
        weights, casts, biases = (tensors[begin : begin + count] for begin in (0, count, 2 * count))
        ctx.count, ctx.weights, ctx.biases = count, weights, [None if bias is None else bias.dtype for bias in biases]
        ctx.save_for_backward(x if any(ctx.needs_input_grad[2 : 2 + count]) else None, *casts)
        ctx.set_materialize_grads(False)
        shapes = (x.shape[:-1] + cast.shape[:1] for cast in casts)
        return tuple(x.new_empty_strided(shape, (0,) * len(shape)) for shape in shapes)

    @staticmethod
    def backward(ctx: Any, *d_outs: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *casts = ctx.saved_tensors
        d_x: Tensor | None = None
        d_weights: list[Tensor | None] = [None] * ctx.count
        d_biases: list[Tensor | None] = [None] * ctx.count
        for index, d_out in enumerate(d_outs):
            if d_out is None:
                continue
            rows = d_out.flatten(0, -2)
            if ctx.needs_input_grad[0]:
                d_x = rows @ casts[index] if d_x is None else torch.addmm(d_x, rows, casts[index], out=d_x)
            if ctx.needs_input_grad[2 + index]:
                d_weights[index] = _weight_gradient(ctx.weights[index], rows, x.flatten(0, -2))
            if ctx.needs_input_grad[2 + 2 * ctx.count + index]:
                d_biases[index] = rows.sum(0, dtype=ctx.biases[index])
        if d_x is not None:
            d_x = d_x.unflatten(0, next(d.shape[:-1] for d in d_outs if d is not None))
        return d_x, None, *d_weights, *([None] * ctx.count), *d_biases


def _weight_gradient(weight: Tensor, d_out: Tensor, x: Tensor) -> Tensor | None:
    """`d_out.T @ x` in the dtype of `weight`; None where it went into `weight.grad`. d_out [rows, out], x [rows, in]."""
    wide, into = weight.dtype == torch.promote_types(x.dtype, torch.float32), weight.grad
    if _open and into is not None and into.dtype == weight.dtype and (wide or into.dtype == x.dtype):
        if wide:
            mm32(d_out.t(), x, out=into, accumulate=True)
        else:
            torch.addmm(into, d_out.t(), x, out=into)
        return None
    return mm32(d_out.t(), x) if wide else d_out.t() @ x
