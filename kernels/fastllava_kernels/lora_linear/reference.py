"""Reference of lora_linear (Hu et al. 2021, arXiv 2106.09685), with a dropout that can be drawn again."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fastllava_kernels._device import philox
from fastllava_kernels.contract import Contract, fits, whole
from fastllava_kernels.nf4 import Nf4, dequantise, layers_of
from fastllava_kernels.room import Implementation


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
    """Compute `x @ W.T + bias + scale * (drop(x) @ A.T) @ B.T` of each of n layers: [T, F_i] in the dtype of x.

    x: [T, D]; weights: W of each layer, [F_i, D], or in its place the four tensors of `fastllava_kernels.nf4.Nf4`, whose codes are
    uint8 [F_i, D / 2]; and biases: [F_i] or None, both frozen; A: [R, D] and B: [F_i, R] of each layer,
    which train. All may have any dtype, and are rounded to that of x for use; the gradients of A and B come in their own.
    dropout: the probability that an element of drop(x) is 0, rounded to a 65536th; the others are divided by the rest of it.
    keys: int64 [T], which decides, with the layer's number in streams, int64 [n], and the column, what is dropped (`philox`); or
    int64 [0], with which nothing is. What is kept for backward is x and drop(x) @ A.T; drop(x) is not materialised.
    """
    below = philox.threshold(dropout) if keys.numel() else 0
    outs = []
    for index, (weight, bias, down, up) in enumerate(zip(layers_of(weights), biases, A, B, strict=True)):
        weight = dequantise(weight, x_TD.dtype) if isinstance(weight, Nf4) else weight
        out = F.linear(x_TD, weight.to(x_TD.dtype), None if bias is None else bias.to(x_TD.dtype))
        seen = x_TD
        if below:
            gone = philox.dropped(keys, streams[index], x_TD.shape[1], below)
            seen = x_TD.masked_fill(gone, 0.0) * philox.correction(below)
        outs.append(out + scale * F.linear(F.linear(seen, down.to(x_TD.dtype)), up.to(x_TD.dtype)))
    return tuple(outs)


def check(
    x_TD: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: float,
    dropout: float,
    keys: Tensor,
    streams: Tensor,
) -> None:
    """Raises ValueError for sizes that do not fit, and for a dropout that leaves nothing."""
    layers = len(biases)
    shapes = [(one.codes.shape[0], 2 * one.codes.shape[-1]) if isinstance(one, Nf4) else tuple(one.shape) for one in layers_of(weights)]
    good = x_TD.ndim == 2 and layers > 0 and layers == len(shapes) == len(A) == len(B)
    good = good and all(one.shape == (A[0].shape[0], x_TD.shape[1]) for one in A)
    for shape, bias, up in zip(shapes, biases, B, strict=False):
        good = good and len(shape) == 2 and shape[1] == x_TD.shape[1] and up.shape == (shape[0], A[0].shape[0])
        good = good and (bias is None or bias.shape == shape[:1])
    what = "x is [T, D], and each layer has W [F, D], a bias [F] or None, A [R, D] with the same R, and B [F, R]"
    fits(good, "lora_linear", what, x_TD, *weights, *(bias for bias in biases if bias is not None), *A, *B)
    good = whole(keys, streams) and keys.shape in ((x_TD.shape[0],), (0,)) and streams.shape == (layers,)
    fits(good, "lora_linear", "keys are [T] or [0], and streams [n], whole numbers", keys, streams)
    if not 0 <= philox.threshold(dropout) < philox.LEVELS:
        raise ValueError(f"lora_linear: dropout is at least 0 and less than 1, and is {dropout}")


CONTRACT = Contract(check, no_gradient=("weights", "biases"), one_dtype=False)
IMPLEMENTATION = Implementation(lora_linear)
