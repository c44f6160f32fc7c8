"""Triton kernels of projector_splice: Linear with the GELU in its epilogue, the last Linear with the splice in its own, and the way back.

The last Linear writes each row to its place in the packed hidden states, beside the text rows, which one kernel gathers from the
embedding table.
"""

import torch
from torch import Tensor

from fastllava_kernels._device.linear import LinearKernels
from fastllava_kernels._device.rows import RowKernels

LINEAR = LinearKernels("projector_splice", ("linear_gelu", "linear_gelu_only", "linear_place", "gelu_backward"))
ROWS = RowKernels("projector_splice", ("embed", "embed_master", "scatter", "gather", "gather_sum", "segment_sum"))
KERNELS = {**LINEAR.kernels, **ROWS.kernels}

linear_gelu, gelu_backward = LINEAR.linear_gelu, LINEAR.gelu_backward
gather_rows, embedding_gradient = ROWS.gather_rows, ROWS.embedding_gradient


def place(
    x_PC: Tensor,
    weight_DC: Tensor | None,
    bias_D: Tensor | None,
    embedding_VD: Tensor,
    token_ids_T: Tensor,
    text_rows: Tensor,
    patch_rows: Tensor,
) -> Tensor:
    """Compute the packed hidden states [T, D]: the last Linear's rows, or x itself without one, beside the text; unnamed rows are NaN."""
    hidden_TD = x_PC.new_full((token_ids_T.shape[0], embedding_VD.shape[1]), torch.nan)
    ROWS.embed_rows(embedding_VD, token_ids_T, text_rows, hidden_TD)
    if weight_DC is None or bias_D is None:
        ROWS.scatter_rows(x_PC, patch_rows, hidden_TD)
    else:
        LINEAR.linear_place(x_PC, weight_DC, bias_D, patch_rows, hidden_TD)
    return hidden_TD
