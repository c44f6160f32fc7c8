"""Triton kernels of splice: every row to its place, back from it, and the embedding's gradient summed by token."""

import torch
from torch import Tensor

from fastllava_kernels._device.rows import RowKernels

ROWS = RowKernels("splice", ("embed", "embed_master", "scatter", "gather", "segment_sum"))
KERNELS = ROWS.kernels

gather_rows, embedding_gradient = ROWS.gather_rows, ROWS.embedding_gradient


def splice(projected_PD: Tensor, embedding_VD: Tensor, token_ids_T: Tensor, text_rows: Tensor, patch_rows: Tensor) -> Tensor:
    """Compute the packed hidden states [T, D]; a row that neither list names is NaN."""
    hidden_TD = projected_PD.new_full((token_ids_T.shape[0], embedding_VD.shape[1]), torch.nan)
    ROWS.embed_rows(embedding_VD, token_ids_T, text_rows, hidden_TD)
    ROWS.scatter_rows(projected_PD, patch_rows, hidden_TD)
    return hidden_TD
