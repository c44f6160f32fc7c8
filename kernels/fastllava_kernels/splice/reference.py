"""Reference of splice: projected patches and text embeddings, every row to its place.

The original does this in `prepare_inputs_labels_for_multimodal` (llava/model/llava_arch.py), with a padded row a sample.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllava_kernels.contract import Contract, fits
from fastllava_kernels.indices import check_rows, inside, or_else
from fastllava_kernels.room import Implementation


def splice(projected_PD: Tensor, embedding_VD: Tensor, token_ids_T: Tensor, text_rows: Tensor, patch_rows: Tensor) -> Tensor:
    """Compute the packed hidden states [T, D], in projected's dtype.

    projected: [P, D]; embedding: [V, D] in any dtype; token_ids: int64 [T]; text_rows: int32, the rows that take
    `embedding[token_ids]`; patch_rows: int32 [P], the row of each patch, T for one that is cut. Each row of T is in
    text_rows or in patch_rows, once.

    NaN in every implementation and on every device: a text row whose id is outside the table (-200 too, the mark of an image),
    and a row that neither list names, as when an entry is no row. An entry that is no row is not followed.
    """
    rows, vocabulary = token_ids_T.shape[0], embedding_VD.shape[0]
    ids = token_ids_T.index_select(0, or_else(text_rows, rows, 0)) if rows else token_ids_T
    text = F.embedding(or_else(ids, vocabulary, 0), embedding_VD).to(projected_PD.dtype)
    text.masked_fill_(~inside(ids, vocabulary).unsqueeze(1), torch.nan)
    # One row more than T is the bin for patches that are cut: no shape depends on how many there are.
    hidden = projected_PD.new_full((rows + 1, embedding_VD.shape[1]), torch.nan)
    hidden.index_copy_(0, or_else(text_rows, rows, rows), text)
    return hidden.index_copy_(0, or_else(patch_rows, rows, rows), projected_PD)[:rows]


def check(projected_PD: Tensor, embedding_VD: Tensor, token_ids_T: Tensor, text_rows: Tensor, patch_rows: Tensor) -> None:
    """Raises ValueError for sizes that do not fit."""
    fits(projected_PD.ndim == 2, "splice", "projected is [P, D]", projected_PD)
    check_rows("splice", projected_PD.shape[0], projected_PD.shape[1], embedding_VD, token_ids_T, text_rows, patch_rows)


CONTRACT = Contract(check, one_dtype=False)
IMPLEMENTATION = Implementation(splice)
