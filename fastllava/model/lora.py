"""LoRA: linear layers whose frozen weight gets a low-rank companion that trains (Hu et al. 2021, arXiv 2106.09685).

Parameters have PEFT's names: `q_proj.lora_A.weight` [rank, in] and `q_proj.lora_B.weight` [out, rank].
"""

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fastllava.config import LoraConfig
from fastllava.model.layers import Linear
from fastllava.model.ops import Ops
from fastllava.model.quantised import Nf4Weight, tensors_of

_PARTS = ("lora_A", "lora_B")
_MODULES = 64
"""More than a decoder layer has linear layers: the numbers of two layers' never meet."""


class LoraLinear(Linear):
    """`x @ weight.T + bias + scale * (dropped(x) @ A.T) @ B.T`, computed by room lora_linear.

    Values that go into A are dropped where `row_keys` says what is drawn for each row; without keys nothing is, as outside training. The
    weight may be quantised.
    """

    def __init__(
        self, inputs: int, outputs: int, bias: bool, lora: LoraConfig, ops: Ops, number: int, weight: Nf4Weight | None = None
    ) -> None:
        super().__init__(inputs, outputs, bias, weight=weight)
        rank = lora.rank or 0
        self.lora_A, self.lora_B = Linear(inputs, rank, bias=False), Linear(rank, outputs, bias=False)
        self.scale, self.dropped, self.ops = lora.scale, lora.dropped, ops.only("lora_linear")
        # A tensor, so that the graph of one decoder layer serves for all; no buffer, so that no cast of the module touches it.
        self.number = torch.tensor([number], dtype=torch.int64, device="cpu")
        """int64 [1]: which layer of the model this is, among the numbers that its dropout is drawn by."""

    def forward(self, x: Tensor, row_keys: Tensor | None = None) -> Tensor:
        return adapted(x, (self,), row_keys)[0]


def adapted(x: Tensor, layers: Sequence[LoraLinear], row_keys: Tensor | None) -> tuple[Tensor, ...]:
    """What each of `layers` makes of the same x [T, in]; row_keys int64 [T], or None where nothing is dropped."""
    first = layers[0]
    keys = torch.empty(0, dtype=torch.int64, device=x.device) if row_keys is None else row_keys
    numbers = first.number if len(layers) == 1 else torch.cat([layer.number for layer in layers])
    return tuple(
        first.ops.lora_linear(
            x,
            [tensor for layer in layers for tensor in tensors_of(layer)],
            [layer.bias for layer in layers],
            [layer.lora_A.weight for layer in layers],
            [layer.lora_B.weight for layer in layers],
            first.scale,
            first.dropped,
            keys,
            numbers,
        )
    )


def number_of(layer: int, place: int) -> int:
    """The number of the `place`-th linear layer of decoder layer `layer`, both from 0, whichever of them have adapters."""
    return layer * _MODULES + place


def adapters(model: nn.Module) -> Iterator[nn.Module]:
    """The parts of `model` that LoRA trains: A and B of every adapted layer."""
    for module in model.modules():
        if isinstance(module, LoraLinear):
            yield from (module.lora_A, module.lora_B)


def is_adapter(name: str) -> bool:
    """Whether the parameter of this dotted name belongs to an adapter."""
    return name.rpartition(".")[0].rpartition(".")[2] in _PARTS


def drawn(name: str, shape: torch.Size, seed: int) -> Tensor:
    """fp32: a new adapter's parameter, by its dotted name: zeros for B, and for A PEFT's uniform numbers below 1 / sqrt(in).

    Each is drawn by `seed` and its own name, so that other targets, or fewer layers, leave the rest as it is.
    """
    if name.endswith("lora_B.weight"):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
