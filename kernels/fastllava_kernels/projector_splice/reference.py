"""Reference of projector_splice: Linear -> exact GELU -> Linear ..., then every row to its place.

The original does this in `prepare_inputs_labels_for_multimodal` (llava/model/llava_arch.py), with a padded row a sample.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllava_kernels import mlp
from fastllava_kernels.indices import check_rows, inside, or_else


def projector_splice(
    features_PC: Tensor,
    layers: Sequence[tuple[Tensor, Tensor]],
    embedding_VD: Tensor,
    token_ids_T: Tensor,
    text_rows: Tensor,
    patch_rows: Tensor,
) -> Tensor:
    """The packed hidden states [T, D], in the features' dtype.

    features: [P, C], C of the vision tower; layers: (weight [out, in], bias [out]) of each Linear, an erf GELU between
    two, none for the identity; embedding: [V, D]; token_ids: int64 [T]; text_rows: int32, the rows that take
    `embedding[token_ids]`; patch_rows: int32 [P], the row of each patch, T for one that is cut. Weights, biases and
    embedding come in any dtype and are rounded to the features' for use. With P = 0 the layers stay in the graph with
    zero gradients.

    NaN in every implementation and on every device: a text row whose id is outside the table (-200 too, the mark of an image),
    and a row that neither list names, as when an entry is no row. An entry that is no row is not followed.
    """
    projected = features_PC
    for index, (weight, bias) in enumerate(layers):
        projected = F.linear(F.gelu(projected) if index else projected, weight.to(projected.dtype), bias.to(projected.dtype))
    rows, vocabulary = token_ids_T.shape[0], embedding_VD.shape[0]
    ids = token_ids_T.index_select(0, or_else(text_rows, rows, 0)) if rows else token_ids_T
    text = F.embedding(or_else(ids, vocabulary, 0), embedding_VD).to(projected.dtype)
    text = text.masked_fill(~inside(ids, vocabulary).unsqueeze(1), torch.nan)
    # One row more than T is the bin for patches that are cut: no shape depends on how many there are.
    hidden = projected.new_full((rows + 1, embedding_VD.shape[1]), torch.nan)
    hidden = hidden.index_copy(0, or_else(text_rows, rows, rows), text)
    return hidden.index_copy(0, or_else(patch_rows, rows, rows), projected)[:rows]


def check(
    features_PC: Tensor,
    layers: Sequence[tuple[Tensor, Tensor]],
    embedding_VD: Tensor,
    token_ids_T: Tensor,
    text_rows: Tensor,
    patch_rows: Tensor,
) -> None:
    """Raises ValueError for sizes that do not fit."""
    width = mlp.check_layers("projector_splice", features_PC, layers)
    check_rows("projector_splice", features_PC.shape[0], width, embedding_VD, token_ids_T, text_rows, patch_rows)
