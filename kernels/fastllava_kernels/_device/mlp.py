"""Forward and backward of an MLP (Linear, exact GELU, Linear, ...) that keeps only what goes into each GELU.

The rooms with a projector share it; each hands in what computes a layer, as kernels or in plain PyTorch. P rows, C features, N layers.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastllava_kernels._device import plain
from fastllava_kernels.contract import fits

LinearGelu = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
"""`plain.linear_gelu`, or the same as a kernel."""
GeluBackward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""`plain.gelu_backward`, or the same as a kernel."""


def check_layers(room: str, features_PC: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> int:
    """Return the width of what the last layer gives. Raises ValueError when one does not take what the one before it gives."""
    good, width = features_PC.ndim == 2, features_PC.shape[-1]
    for weight, bias in layers:
        good = good and weight.ndim == 2 and weight.shape[1] == width and bias.shape == weight.shape[:1]
        width = weight.shape[0]
    what = "features are [P, C], and each layer, [out, in] and [out], takes what the one before it gives"
    fits(good, room, what, features_PC, *(tensor for layer in layers for tensor in layer))
    return width


def as_used(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight as the products read it: in their dtype, contiguous."""
    return weight.to(dtype).contiguous()


def keeps(features: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> bool:
    """Whether a backward through the layers may follow, so that what goes into each GELU is kept."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in (features, *weights, *biases))


def hidden_layers(
    linear_gelu: LinearGelu, features_PC: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return what goes into the last Linear; and, if `keep`, what goes into each GELU."""
    x, pres = features_PC, []
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        pre, x = linear_gelu(x, as_used(weight, x.dtype), bias.contiguous(), keep)
        if keep:
            pres.append(pre)
    return x, pres


def backward(
    gelu_backward: GeluBackward,
    d_out: Tensor,
    d_out_sum: Tensor,
    features_PC: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    pres: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Compute the gradients of features, of the N weights and of the N biases, each in its tensor's dtype; empty where not `wanted`.

    d_out: [P, outputs]; d_out_sum: its column sums in fp32; wanted: 1 + 2N flags in that order. fp32 masters get the fp32
    sums unrounded. P = 0 gives zeros.
    """
    count = len(weights)
    inputs = [features_PC, *weights, *biases]
    if not features_PC.shape[0]:
        return [torch.zeros_like(x) if want else x.new_empty(0) for x, want in zip(inputs, wanted, strict=True)]
    gradients = [x.new_empty(0) for x in inputs]
    for index in reversed(range(count)):
        if wanted[1 + count + index]:
            gradients[1 + count + index] = d_out_sum.to(biases[index].dtype)
        deeper = wanted[0] or any(wanted[1 : 1 + index]) or any(wanted[1 + count : 1 + count + index])
        x, d_x = features_PC, d_out
        if index and (deeper or wanted[1 + index]):
            d_x, x, d_out_sum = gelu_backward(d_out, as_used(weights[index], d_out.dtype), pres[index - 1])
        if wanted[1 + index]:
            gradients[1 + index] = plain.weight_gradient(d_out, x, weights[index].dtype)
        if not deeper:
            return gradients
        if not index:
            d_x = d_out @ as_used(weights[0], d_out.dtype)
        d_out = d_x
    # Without a layer it is the gradient of the output.
    gradients[0] = d_out if wanted[0] else gradients[0]
    return gradients
