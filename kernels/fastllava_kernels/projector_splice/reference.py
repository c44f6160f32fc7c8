"""Reference of projector_splice: projector_mlp and then splice, whose references it is made of.

The original does this in `prepare_inputs_labels_for_multimodal` (llava/model/llava_arch.py), with a padded row a sample.
"""

from collections.abc import Sequence

from torch import Tensor

from fastllava_kernels._device import mlp
from fastllava_kernels.contract import Contract
from fastllava_kernels.indices import check_rows
from fastllava_kernels.projector_mlp.reference import projector_mlp
from fastllava_kernels.room import Implementation
from fastllava_kernels.splice.reference import splice


def projector_splice(
    features_PC: Tensor,
    layers: Sequence[tuple[Tensor, Tensor]],
    embedding_VD: Tensor,
    token_ids_T: Tensor,
    text_rows: Tensor,
    patch_rows: Tensor,
) -> Tensor:
    """Compute the packed hidden states [T, D], in the features' dtype: `splice(projector_mlp(features, layers), embedding, ...)`.

    features: [P, C], C of the vision tower; layers: (weight [out, in], bias [out]) of each Linear, an erf GELU between
    two, none for the identity; embedding: [V, D]; token_ids: int64 [T]; text_rows: int32, the rows that take
    `embedding[token_ids]`; patch_rows: int32 [P], the row of each patch, T for one that is cut. Weights, biases and
    embedding come in any dtype and are rounded to the features' for use. With P = 0 the layers stay in the graph with
    zero gradients.

    NaN in every implementation and on every device: a text row whose id is outside the table (-200 too, the mark of an image),
    and a row that neither list names, as when an entry is no row. An entry that is no row is not followed.
    """
    return splice(projector_mlp(features_PC, layers), embedding_VD, token_ids_T, text_rows, patch_rows)


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


CONTRACT = Contract(check, one_dtype=False)
IMPLEMENTATION = Implementation(projector_splice)
