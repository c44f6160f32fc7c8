"""Frozen weights in NF4 (`model.quantize`, QLoRA): those of the linear layers of the decoder's blocks, and none else.

Each is rounded to the dtype that is computed in, then quantised, as it is read. Its parameters have the name of the weight and a field
of `fastllava_kernels.nf4.Nf4`, such as `q_proj.weight.codes`. Embedding, head, norms, biases, tower and projector stay as they are.
"""

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from fastllava.config import Quantize
from fastllava.errors import UserError
from fastllava.model.hashes import hashed
from fastllava.model.layers import Linear, set_parameter
from fastllava.model.ops import Ops
from fastllava.model.products import Product
from fastllava_kernels.nf4 import BLOCK, NESTED_BLOCK, Nf4, dequantise, quantise

_DOUBLE: Mapping[Quantize, bool] = {"nf4": False, "nf4_double": True}
"""Whether scales are quantised too."""


class Nf4Weight(nn.Module):
    """The weight [out, in] of a linear layer in NF4, in place of a parameter."""

    def __init__(self, outputs: int, inputs: int, double: bool) -> None:
        super().__init__()
        blocks = -(-outputs * inputs // BLOCK)
        self.shape = torch.Size((outputs, inputs))
        self.digest: str | None = None
        """`hashed` of the weight that was quantised."""
        self.codes = _frozen(torch.empty(outputs, inputs // 2, dtype=torch.uint8))
        self.absmax = _frozen(torch.empty(blocks, dtype=torch.uint8 if double else torch.float32))
        self.nested_absmax = _frozen(torch.empty(-(-blocks // NESTED_BLOCK) if double else 0))
        self.offset = _frozen(torch.empty(int(double)))

    @property
    def tensors(self) -> Nf4:
        """The tensors that rooms take in place of a weight."""
        return Nf4(self.codes, self.absmax, self.nested_absmax, self.offset)

    def put(self, weight: Tensor) -> None:
        """Quantise `weight` and keep that. Raises ValueError where it is not finite."""
        self.digest = hashed(weight)
        for name, tensor in quantise(weight, double=self.absmax.dtype is torch.uint8)._asdict().items():
            setattr(self, name, _frozen(tensor))


class Nf4Linear(Linear):
    """A linear layer whose weight is an `Nf4Weight`, computed by room nf4_linear."""

    def __init__(self, inputs: int, outputs: int, bias: bool, weight: Nf4Weight, ops: Ops) -> None:
        super().__init__(inputs, outputs, bias, cast(Product, self._multiplied), weight)
        self.ops = ops.only("nf4_linear")

    def _multiplied(self, x: Tensor, weight: Nf4Weight, bias: Tensor | None) -> Tensor:
        return self.ops.nf4_linear(x, *weight.tensors, bias)


def quantised_weight(name: str, inputs: int, outputs: int, wanted: Quantize) -> Nf4Weight:
    """An `Nf4Weight` without values, on the current default device. Raises UserError for one with rows of odd length."""
    if inputs % 2:
        raise UserError(f"model.quantize: {name} has rows of {inputs} weights, and two go into a byte; write model.quantize=null")
    return Nf4Weight(outputs, inputs, _DOUBLE[wanted])


def tensors_of(layer: Linear) -> tuple[Tensor, ...]:
    """The tensors that a room takes for the weight of `layer`: it, or the four that it is kept as."""
    return layer.weight.tensors if isinstance(layer.weight, Nf4Weight) else (layer.weight,)


def weights_by_name(model: nn.Module) -> dict[str, Nf4Weight | nn.Parameter]:
    """Every parameter of `model` by its name, and for the parameters of a quantised weight that weight by its."""
    quantised = {name: module for name, module in model.named_modules() if isinstance(module, Nf4Weight)}
    return quantised | {name: one for name, one in model.named_parameters() if name.rpartition(".")[0] not in quantised}


def put(model: nn.Module, name: str, value: Tensor) -> None:
    """Give the weight of this name its value, which is quantised on the way where the weight is. Raises ValueError as `quantise`."""
    owner, _, leaf = name.rpartition(".")
    place = getattr(model.get_submodule(owner), leaf)
    if isinstance(place, Nf4Weight):
        place.put(value)
    else:
        set_parameter(model, name, nn.Parameter(value))


def dense(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight as it is computed with: a quantised one dequantised in `dtype`."""
    for name, weight in weights_by_name(model).items():
        yield name, dequantise(weight.tensors, dtype) if isinstance(weight, Nf4Weight) else weight.detach()


def count(model: nn.Module) -> int:
    """How many weights there are, however many bytes each is kept in."""
    return sum(weight.shape.numel() for weight in weights_by_name(model).values())


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
