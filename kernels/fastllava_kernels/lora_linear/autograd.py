"""The custom ops of lora_linear, with fake and autograd, over what computes its low-rank products: `kernel_lora` or plain PyTorch.

There are two, one after the other. `lora_linear_<name>_hidden` computes h = drop(x) @ A.T of each layer, keeps what backward needs, and
gives a place for each result: of its shape, without memory. `lora_linear_<name>` computes the results, keeps nothing, and hands the
gradient of each to its place. So what computes a layer again, and is done when backward has all that it needs, can stop before the
products. The base products are the library's. T rows, D columns, n layers of rank R.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastllava_kernels._device import nf4, philox
from fastllava_kernels.contract import custom_op
from fastllava_kernels.mm32 import mm32
from fastllava_kernels.nf4 import layers_of


def define(
    name: str, code: Callable[[Tensor], Any], part: Callable[[Tensor], nf4.Part] = lambda tensor: nf4.plain_part
) -> Callable[..., tuple[Tensor, ...]]:
    """Return the function of implementation `name`: custom ops, with another one for their backward.

    code(tensor): the module whose `shrink`, `add_to_input_gradient` and `A_gradient` compute where the tensor lies; part(tensor): what
    dequantises a part of a weight there.
    """

    @custom_op(f"lora_linear_{name}_hidden")
    def hidden(
        x: Tensor,
        weights: Sequence[Tensor],
        A: Sequence[Tensor],
        B: Sequence[Tensor],
        scale: float,
        below: int,
        keys: Tensor,
        streams: Tensor,
    ) -> list[Tensor]:
        """Return h [T, n, R], then the places of the results."""
        stacked = _stacked(A, x.dtype)
        h = code(x).shrink(x, stacked, keys, streams, below) if below and len(x) else x @ stacked.t()
        return [h.view(len(x), len(A), len(A[0])), *_places(x, B)]

    @hidden.register_fake
    def _(x, weights, A, B, scale, below, keys, streams):
        return [x.new_empty(x.shape[0], len(A), A[0].shape[0]), *_places(x, B)]

    @custom_op(f"lora_linear_{name}")
    def results(
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        h: Tensor,
        B: Sequence[Tensor],
        scale: float,
        places: Sequence[Tensor],
    ) -> list[Tensor]:
        """Compute the results, [T, F_i]. biases: empty where there is none."""
        dequantised = part(x)
        outs = [
            nf4.product(dequantised, x, weight, bias if len(bias) else None)
            for weight, bias in zip(layers_of(weights), biases, strict=True)
        ]
        for index, (out, up) in enumerate(zip(outs, B, strict=True)):
            torch.addmm(out, h[:, index], up.to(x.dtype).t(), alpha=scale, out=out)
        return outs

    @results.register_fake
    def _(x, weights, biases, h, B, scale, places):
        return [x.new_empty(x.shape[0], up.shape[0]) for up in B]

    @custom_op(f"lora_linear_{name}_backward")
    def backward(
        x: Tensor,
        d_outs: Sequence[Tensor | None],
        weights: Sequence[Tensor],
        A: Sequence[Tensor],
        B: Sequence[Tensor],
        h: Tensor,
        scale: float,
        below: int,
        keys: Tensor,
        streams: Tensor,
        wanted: Sequence[bool],
    ) -> list[Tensor]:
        """Compute the gradients of x, of each A and of each B, all in their tensors' dtypes; wanted: of x, of A, of B; empty where not."""
        of_x, of_A, of_B = wanted
        d_x, d_h = None, torch.empty_like(h)
        d_B = [torch.zeros_like(up) if of_B else up.new_empty(0) for up in B]
        for index, (d_out, weight, up) in enumerate(zip(d_outs, layers_of(weights), B, strict=True)):
            into = d_h[:, index]
            if d_out is None:
                into.zero_()
                continue
            torch.addmm(into, d_out, up.to(x.dtype), beta=0, alpha=scale, out=into)
            if of_B:
                d_B[index] = mm32(d_out.t(), h[:, index]).mul_(scale).to(up.dtype)
            if of_x:
                d_x = nf4.added_gradient(part(x), d_out, weight, d_x)
        d_x = x.new_zeros(x.shape if of_x else 0) if d_x is None else d_x
        stacked, steps, drops = _stacked(A, x.dtype), code(x), bool(below) and len(x) > 0
        if of_x and drops:
            steps.add_to_input_gradient(d_x, d_h, stacked, keys, streams, below)
        elif of_x:
            torch.addmm(d_x, d_h.flatten(1), stacked, out=d_x)
        if not of_A:
            return [d_x, *(x.new_empty(0) for _ in A), *d_B]
        d_A = steps.A_gradient(d_h, x, keys, streams, below) if drops else mm32(d_h.flatten(1).t(), x)
        # Apart, since none of what an op gives may share its memory with another.
        return [d_x, *(part.to(down.dtype, copy=True) for part, down in zip(d_A.split(len(A[0])), A, strict=True)), *d_B]

    @backward.register_fake
    def _(x, d_outs, weights, A, B, h, scale, below, keys, streams, wanted):
        flags = [wanted[0], *(wanted[1] for _ in A), *(wanted[2] for _ in B)]
        return [one.new_empty(one.shape if want else 0) for one, want in zip((x, *A, *B), flags, strict=True)]

    def keep(ctx, inputs, output) -> None:
        x, weights, A, B, ctx.scale, ctx.below, keys, streams = inputs
        ctx.set_materialize_grads(False)
        ctx.layers = len(A)
        ctx.save_for_backward(x, output[0], keys, streams, *A, *B, *weights)

    def run_backward(ctx, grads):
        x, h, keys, streams, *rest = ctx.saved_tensors
        n = ctx.layers
        A, B, weights = rest[:n], rest[n : 2 * n], rest[2 * n :]
        needs_x, needs_weights, needs_A, needs_B, *_ = ctx.needs_input_grad
        wanted = [needs_x, any(needs_A), any(needs_B)]
        found = backward(x, grads[1:], weights, A, B, h, ctx.scale, ctx.below, keys, streams, wanted)
        flags = [needs_x, *needs_A, *needs_B]
        d_x, *d_layers = [gradient if want else None for gradient, want in zip(found, flags, strict=True)]
        return d_x, [None for _ in needs_weights], d_layers[:n], d_layers[n:], None, None, None, None

    hidden.register_autograd(run_backward, setup_context=keep)

    def keep_nothing(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.tensors, ctx.layers = len(inputs[1]), len(inputs[2])

    def hand_on(ctx, grads):
        none = [None] * ctx.layers
        return None, [None] * ctx.tensors, none, None, none, None, list(grads)

    results.register_autograd(hand_on, setup_context=keep_nothing)

    def lora_linear(
        x_TD: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        A: Sequence[Tensor],
        B: Sequence[Tensor],
        scale: float,
        dropout: float,
        keys: Tensor,
        streams: Tensor,
    ) -> tuple[Tensor, ...]:
        below = philox.threshold(dropout) if keys.numel() else 0
        h, *places = hidden(x_TD, weights, A, B, scale, below, keys, streams)
        given = [x_TD.new_empty(0) if bias is None else bias for bias in biases]
        own = [up.detach() for up in B]
        return tuple(results(x_TD.detach(), weights, given, h.detach(), own, scale, places))

    return lora_linear


def _stacked(A: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the A of all layers one below the other, [n R, D], as the products read them: in their dtype, contiguous."""
    if len(A) == 1:
        return A[0].to(dtype).contiguous()
    stacked = A[0].new_empty(sum(map(len, A)), A[0].shape[1], dtype=dtype)
    torch._foreach_copy_(list(stacked.split(len(A[0]))), list(A))  # pyright: ignore[reportPrivateImportUsage]
    return stacked


def _places(x: Tensor, B: Sequence[Tensor]) -> list[Tensor]:
    """Return a place for each result: of its shape, without memory."""
    return [x.new_empty_strided((x.shape[0], up.shape[0]), (0, 0)) for up in B]
