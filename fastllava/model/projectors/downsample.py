"""`mlp_downsample`, VILA's projector (llava/model/multimodal_projector/base_projector.py of NVlabs/VILA): 2x2 patches become one token.

The features of four neighbours are put side by side, normalised, and go through two Linear layers with an erf GELU between them. It
reduces the long cost of an image: of 576 patches the decoder sees 144 tokens. A model with it is another one than LLaVA-1.5.

Shape letters: I images, P = G x G patches an image, N = P / 4 tokens an image, C tower width, D decoder width.
"""

import math
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from fastllava.errors import UserError
from fastllava.model.layers import LayerNorm, Linear
from fastllava.model.ops import Ops
from fastllava.model.projectors.base import Kind, Projector

_EPS = 1e-5
"""PyTorch's default, which VILA takes."""


def joined(features_IPC: Tensor, grid: int) -> Tensor:
    """[I, N, 4 C]: the features of 2x2 neighbours side by side, as VILA orders them.

    Tokens go down the columns of the grid, one column of pairs after another. Within a token the upper row comes first, and in it
    the left patch.
    """
    blocks = features_IPC.unflatten(1, (grid // 2, 2, grid // 2, 2))
    return blocks.permute(0, 3, 1, 2, 4, 5).flatten(1, 2).flatten(2)


def tokens(patches: int) -> int:
    """N for P patches. Raises UserError when their grid has an odd side."""
    grid = math.isqrt(patches)
    if grid % 2:
        raise UserError(
            f"model.projector_type: mlp_downsample joins 2x2 patches, and this tower has a grid of {grid}x{grid}; give a tower with an "
            "even grid, such as CLIP-L/14 at 336 pixels with 24x24, or write model.projector_type=mlp2x_gelu"
        )
    return patches // 4


class Downsample(Projector):
    """LayerNorm, Linear, erf GELU and Linear on 2x2 patches; parameter names are VILA's: `layers.{1,2,4}.{weight,bias}`."""

    def __init__(self, projector_type: str, inputs: int, outputs: int, patches: int, ops: Ops) -> None:
        super().__init__(projector_type)
        tokens(patches)
        self.grid = math.isqrt(patches)
        self.layers = nn.ModuleDict(
            {
                "1": LayerNorm(4 * inputs, _EPS, ops),
                "2": Linear(4 * inputs, outputs, bias=True),
                "4": Linear(outputs, outputs, bias=True),
            }
        )

    def forward(self, features_IPC: Tensor) -> Tensor:
        norm, up, out = self.layers.values()
        return out(F.gelu(up(norm(joined(features_IPC, self.grid).flatten(0, 1)))))


def reference(weights: Mapping[str, Tensor], features_IPC: Tensor) -> Tensor:
    """Compute the projector in plain PyTorch, from its weights by name: [I, N, D] of features [I, P, C]."""
    norm, up, out = ((weights[f"layers.{index}.weight"], weights[f"layers.{index}.bias"]) for index in (1, 2, 4))
    x = joined(features_IPC, math.isqrt(features_IPC.shape[1]))
    return F.linear(F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], *norm, _EPS), *up)), *out)


DOWNSAMPLE = Kind(
    Downsample,
    reference,
    tokens,
    original=False,
    remark="VILA's projector, which makes one token of 2x2 patches",
)
