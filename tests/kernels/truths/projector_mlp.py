"""Room projector_mlp: the op once more in fp64 without the op it judges, its cases, and its nearest wrong one."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from judging import Args, draw
from torch import Tensor


def truth(features: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """One row after another; the GELU is the one with erf."""
    rows = []
    for row in features:
        hidden = row
        for index, (weight, bias) in enumerate(layers):
            if index:
                hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            hidden = weight @ hidden + bias
        rows.append(hidden)
    if not rows:
        return features @ layers[0][0].T if layers else features
    return torch.stack(rows)


def inputs(patches: int, *widths: int, scale: float = 1.0) -> Args:
    """Features of the first width and a Linear layer from each width to the next."""
    layers = [(draw(out, into, seed=out + i, scale=scale), draw(out, seed=40 + i)) for i, (into, out) in enumerate(pairwise(widths))]
    return draw(patches, widths[0], seed=1), layers


CASES: dict[str, Args] = {
    "mlp2x": inputs(12, 6, 12, 3, scale=0.7),
    "mlp3x": inputs(7, 6, 5, 4, 3),
    "linear": inputs(7, 6, 5),
    "identity": inputs(7, 5),
    "more than a tile of everything": inputs(70, 40, 45, 35, scale=0.2),
    "whole tiles": inputs(64, 32, 64, 32, scale=0.2),
    "one patch": inputs(1, 16, 12, 12),
    "no patch": inputs(0, 6, 5, 5),
}


def wrong(features: Tensor, layers: Any) -> Tensor:
    """The GELU with tanh."""
    hidden = features @ layers[0][0].T + layers[0][1]
    return torch.nn.functional.gelu(hidden, approximate="tanh") @ layers[1][0].T + layers[1][1]


WRONG_CASE = "mlp2x"
