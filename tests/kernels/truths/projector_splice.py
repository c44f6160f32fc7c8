"""Room projector_splice: the op once more in fp64 without the op it judges, its cases, and its nearest wrong one."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from judging import Args, draw
from torch import Tensor


def truth(
    features: Tensor, layers: Sequence[tuple[Tensor, Tensor]], embedding: Tensor, token_ids: Tensor, text_rows: Tensor, patch_rows: Tensor
) -> Tensor:
    """One row after another; the GELU is the one with erf."""
    rows = {row: embedding[token_ids[row]] for row in text_rows.tolist()}
    for patch, row in enumerate(patch_rows.tolist()):
        hidden = features[patch]
        for index, (weight, bias) in enumerate(layers):
            if index:
                hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            hidden = weight @ hidden + bias
        rows[row] = hidden
    return torch.stack([rows[row] for row in range(len(token_ids))]) if len(token_ids) else embedding[:0]


def splice_inputs(rows: int, patch_rows: Sequence[int], depth: int, tower: int = 6, width: int = 5, scale: float = 1.0) -> Args:
    """`depth` Linear layers from width `tower` to `width`; none is the identity, with features as wide as the embedding."""
    widths = [tower if depth else width] + [width] * depth
    layers = [(draw(out, into, seed=out + i, scale=scale), draw(out, seed=40 + i)) for i, (into, out) in enumerate(pairwise(widths))]
    text = [row for row in range(rows) if row not in patch_rows]
    ids = torch.tensor([(7 * row + 3) % 9 if row in text else 0 for row in range(rows)], dtype=torch.int64)
    where = torch.tensor(list(patch_rows), dtype=torch.int32)
    return draw(len(patch_rows), widths[0], seed=1), layers, draw(9, width, seed=2), ids, torch.tensor(text, dtype=torch.int32), where


CASES: dict[str, Args] = {
    "mlp2x": splice_inputs(9, [2, 3, 4, 5], 2),
    "mlp3x": splice_inputs(9, [2, 3, 4, 5], 3),
    "linear": splice_inputs(9, [0, 1, 7, 8], 1),
    "identity": splice_inputs(6, [1, 2], 0),
    "no image": splice_inputs(4, [], 2),
    "image only": splice_inputs(3, [0, 1, 2], 2),
    "patches cut away": splice_inputs(5, [3, 4, 5, 5, 5], 2),
    "more than a tile of everything": splice_inputs(90, [*range(3, 45), *range(60, 89), 90, 90], 2, 40, 37, 0.2),
    "whole tiles": splice_inputs(80, range(64), 2, 32, 32, 0.2),
    "patches out of order": splice_inputs(40, [*range(39, 2, -1)], 2),
    "one token": splice_inputs(1, [], 2),
}


def wrong(features: Tensor, layers: Any, embedding: Tensor, token_ids: Tensor, text_rows: Tensor, patch_rows: Tensor) -> Tensor:
    """The GELU with tanh."""
    hidden = features @ layers[0][0].T + layers[0][1]
    hidden = torch.nn.functional.gelu(hidden, approximate="tanh") @ layers[1][0].T + layers[1][1]
    return embedding[token_ids].index_copy(0, patch_rows.long(), hidden)


WRONG_CASE = "mlp2x"
