"""Linear, embedding and norms that hold their weight in any dtype and compute in the dtype of their input.

Trainable weights are kept in fp32 and frozen ones in the compute dtype; the cast at use is no work when they agree.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastllava.model.ops import Ops
from fastllava.model.products import Product, linear, products
from fastllava_kernels.room import REFERENCE


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put `parameter` in the place of the one with this dotted name, such as `model.layers.0.mlp.up_proj.weight`."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)


class Linear(nn.Module):
    """`x @ weight.T + bias`, computed by `product`; weight [out, in], bias [out] or None.

    Not initialised: weights are read, or drawn by the projector. `weight`: what holds the weight in another form, for a `product` that
    takes it.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, product: Product = linear, weight: nn.Module | None = None) -> None:
        super().__init__()
        self.weight: Any = _empty(outputs, inputs) if weight is None else weight
        self.bias = _empty(outputs) if bias else None
        self.product = product

    def forward(self, x: Tensor, row_keys: Tensor | None = None) -> Tensor:
        """[..., out] of x [..., in]; row_keys are for layers that drop something."""
        return multiply(x, self)[0]


def multiply(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """What each of `layers` makes of the same x [..., in]. In backward their parts of its gradient are added up in the products."""
    if torch.compiler.is_compiling() or any(layer.product is not linear for layer in layers):
        return tuple(layer.product(x, layer.weight, layer.bias) for layer in layers)
    return products(x, [layer.weight for layer in layers], [layer.bias for layer in layers])


class Embedding(nn.Module):
    """A table; weight [rows, width]. Whoever looks rows up does it with the room or the slice it needs."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = _empty(rows, width)


class RMSNorm(nn.Module):
    """Room rms_norm with its weight [width]."""

    def __init__(self, width: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight, self.eps, self.ops = _empty(width), eps, ops.only("rms_norm")

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight.to(x.dtype), self.eps)


class AddRMSNorm(nn.Module):
    """Room add_rms_norm with its weight [width]: the norm of `x + residual`, and that sum."""

    def __init__(self, width: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight, self.eps, self.ops = _empty(width), eps, ops.only("add_rms_norm")

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return self.ops.add_rms_norm(x, residual, self.weight.to(x.dtype), self.eps)


class StreamNorm(nn.Module):
    """The norm of `x + residual`, both [T, D], with its weight [width], and that sum; without a residual x is the sum.

    `sums_in_norm`: room add_rms_norm does both in one pass, which it may where room rms_norm is of the same implementation, so that a
    sum which is there has the same norm, bit for bit, and where little is kept beside the sum. Otherwise PyTorch adds.
    """

    def __init__(self, width: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.sums_in_norm = ops.chosen["add_rms_norm"] == ops.chosen["rms_norm"] != REFERENCE
        self.weight, self.eps = _empty(width), eps
        self.ops = ops.only("rms_norm", "add_rms_norm") if self.sums_in_norm else ops.only("rms_norm")

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        weight = self.weight.to(x.dtype)
        if residual is not None and self.sums_in_norm:
            return self.ops.add_rms_norm(x, residual, weight, self.eps)
        summed = x if residual is None else x + residual
        return self.ops.rms_norm(summed, weight, self.eps), summed


class LayerNorm(nn.Module):
    """Room layer_norm with its weight and bias [width]; without a bias the room gets zeros."""

    def __init__(self, width: int, eps: float, ops: Ops, bias: bool = True) -> None:
        super().__init__()
        self.weight, self.bias = _empty(width), _empty(width) if bias else None
        self.eps, self.ops = eps, ops.only("layer_norm")

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        bias = torch.zeros_like(weight) if self.bias is None else self.bias.to(x.dtype)
        return self.ops.layer_norm(x, weight, bias, self.eps)
