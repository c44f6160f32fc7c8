"""Room splice: the op once more in fp64 without the op it judges, its cases, and its nearest wrong one."""

from collections.abc import Sequence

import torch
from judging import Args, draw
from torch import Tensor


def truth(projected: Tensor, embedding: Tensor, token_ids: Tensor, text_rows: Tensor, patch_rows: Tensor) -> Tensor:
    """One row after another."""
    rows = {row: embedding[token_ids[row]] for row in text_rows.tolist()}
    rows |= {row: projected[patch] for patch, row in enumerate(patch_rows.tolist())}
    return torch.stack([rows[row] for row in range(len(token_ids))]) if len(token_ids) else embedding[:0]


def inputs(rows: int, patch_rows: Sequence[int], width: int = 5, tokens: int = 9) -> Args:
    """Text tokens repeat, as `tokens` is small."""
    text = [row for row in range(rows) if row not in patch_rows]
    ids = torch.tensor([(7 * row + row // 3) % tokens if row in text else 0 for row in range(rows)], dtype=torch.int64)
    where = torch.tensor(list(patch_rows), dtype=torch.int32)
    return draw(len(patch_rows), width, seed=1), draw(tokens, width, seed=2), ids, torch.tensor(text, dtype=torch.int32), where


CASES: dict[str, Args] = {
    "usual": inputs(9, [2, 3, 4, 5]),
    "more than a tile of everything": inputs(90, [*range(3, 25), *range(60, 90)], width=37, tokens=3),
    "one token many times": inputs(36, [0], width=17, tokens=1),
    "no image": inputs(4, []),
    "image only": inputs(3, [0, 1, 2]),
    "patches cut away": inputs(5, [3, 4, 5, 5, 5]),
    "one token": inputs(1, []),
    "nothing": inputs(0, []),
}


def wrong(projected: Tensor, embedding: Tensor, token_ids: Tensor, text_rows: Tensor, patch_rows: Tensor) -> Tensor:
    """The patches one row too late, as after a token that is not there."""
    return embedding[token_ids].index_copy(0, patch_rows.long() + 1, projected)


WRONG_CASE = "usual"
