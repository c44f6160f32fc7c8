"""Reference of projector_mlp: Linear -> exact GELU -> Linear ..., the original's `mlpNx_gelu` and `linear` projectors.

The original builds it in llava/model/multimodal_projector/builder.py.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fastllava_kernels._device import mlp
from fastllava_kernels.contract import Contract
from fastllava_kernels.room import Implementation


def projector_mlp(features_PC: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Apply each Linear in turn, an erf GELU between two: [P, D] in the features' dtype; the features themselves without layers.

    features: [P, C]; layers: (weight [out, in], bias [out]) of each Linear, in any dtype, rounded to the features' for use.
    With P = 0 the layers stay in the graph with zero gradients.
    """
    projected = features_PC
    for index, (weight, bias) in enumerate(layers):
        projected = F.linear(F.gelu(projected) if index else projected, weight.to(projected.dtype), bias.to(projected.dtype))
    return projected


def check(features_PC: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Raises ValueError for sizes that do not fit."""
    mlp.check_layers("projector_mlp", features_PC, layers)


CONTRACT = Contract(check, one_dtype=False)
IMPLEMENTATION = Implementation(projector_mlp)
