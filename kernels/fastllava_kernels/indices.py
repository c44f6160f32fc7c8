"""Indices that come from outside: compared in their own width, and never followed where they lead to no row."""

import torch
from torch import Tensor

from fastllava_kernels.contract import fits, whole


def inside(indices: Tensor, size: int) -> Tensor:
    """Tell which indices are one of the rows 0 to size - 1: bool, of their shape."""
    return (indices >= 0) & (indices < size)


def or_else(indices: Tensor, size: int, other: int) -> Tensor:
    """Return `indices` as int64, with `other` in place of those that are no row of `size`."""
    return torch.where(inside(indices, size), indices, other).long()


def nan_unless_bounds(cu_seqlens: Tensor, rows: int, longest: int) -> Tensor:
    """Return 0 where `cu_seqlens` cuts `rows` into samples of at most `longest` rows one after another, else NaN: an fp32 scalar.

    Computed on the device, so that what it is added to stops a run whose bounds are wrong without a wait.
    """
    wide = cu_seqlens.long()
    lengths = wide.diff()
    wrong = (wide[0] != 0) | (wide[-1] != rows) | ((lengths < 0) | (lengths > longest)).any()
    return torch.where(wrong, torch.nan, 0.0)


def check_rows(
    room: str, patches: int, width: int, embedding_VD: Tensor, token_ids_T: Tensor, text_rows: Tensor, patch_rows: Tensor
) -> None:
    """Raises ValueError when the table or the lists of rows cannot belong to so many patches of that width."""
    good = embedding_VD.ndim == 2 and embedding_VD.shape[1] == width and embedding_VD.shape[0] > 0
    fits(good, room, f"patches are [P, {width}], so embedding is [V, {width}]", embedding_VD)
    given = token_ids_T, text_rows, patch_rows
    good = token_ids_T.ndim == text_rows.ndim == patch_rows.ndim == 1 and whole(*given)
    good = good and text_rows.shape[0] <= token_ids_T.shape[0] and patch_rows.shape[0] == patches
    fits(good, room, "token_ids are [T], text_rows at most T, patch_rows one for each patch, whole numbers", *given)
