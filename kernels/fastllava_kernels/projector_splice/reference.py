"""Reference of projector_splice: Linear -> exact GELU -> Linear ..., then every row to its place.

The original does this in `prepare_inputs_labels_for_multimodal` (llava/model/llava_arch.py), with a padded row a sample.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


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
    """
    projected = features_PC
    for index, (weight, bias) in enumerate(layers):
        projected = F.linear(F.gelu(projected) if index else projected, weight.to(projected.dtype), bias.to(projected.dtype))
    rows = token_ids_T.shape[0]
    text = text_rows.long()
    # One row more than T is the bin for patches that are cut: no shape depends on how many there are.
    hidden = projected.new_zeros(rows + 1, embedding_VD.shape[1])
    hidden = hidden.index_copy(0, text, F.embedding(token_ids_T[text], embedding_VD).to(hidden.dtype))
    return hidden.index_copy(0, patch_rows.long(), projected)[:rows]
