"""Adapters in plain PyTorch: transformers' linear layers with A and B beside them, and the dropout that the run draws.

What is dropped is an input here, as a batch is: the same function of the rows' keys as in the trainer, laid out as padded batches are.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from fastllava.model.llava import Llava
from fastllava.model.lora import LoraLinear
from fastllava_kernels._device import philox


class RowKeys:
    """The keys of the rows of a padded batch, for all layers of a model; none where nothing is dropped."""

    padded: Tensor | None = None
    """int64 [B, L]."""


class _Adapted(nn.Module):
    """`linear(x) + scale * B(A(dropped(x)))` of x [B, L, in]; only A and B train."""

    def __init__(self, linear: nn.Module, ours: LoraLinear, a: Tensor, b: Tensor, keys: RowKeys) -> None:
        super().__init__()
        self.linear, self.keys = linear.requires_grad_(False), keys
        self.lora_A, self.lora_B = _Matrix(a), _Matrix(b)
        self.scale, self.below, self.number = ours.scale, philox.threshold(ours.dropped), ours.number.to(a.device)

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        if self.keys.padded is not None:
            dropped = philox.dropped(self.keys.padded.flatten(), self.number, x.shape[-1], self.below).view(x.shape)
            seen = x.masked_fill(dropped, 0.0) * philox.correction(self.below)
        return self.linear(x) + self.scale * F.linear(F.linear(seen, self.lora_A.weight), self.lora_B.weight)


class _Matrix(nn.Module):
    """A weight that trains, under the name that it has in our model."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def adapt(llm: nn.Module, ours: Llava, weights: Mapping[str, Tensor]) -> RowKeys:
    """Put the adapters of `ours` into transformers' decoder, with `weights` by our names; where their keys are to be put."""
    keys = RowKeys()
    for name, module in ours.llm.named_modules():
        if isinstance(module, LoraLinear):
            a, b = (weights[f"llm.{name}.{part}.weight"] for part in ("lora_A", "lora_B"))
            llm.set_submodule(name, _Adapted(llm.get_submodule(name), module, a, b, keys))
    return keys
