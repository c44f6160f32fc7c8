"""Reference of splice: projected patches and text embeddings, every row to its place.

The original does this in `prepare_inputs_labels_for_multimodal` (llava/model/llava_arch.py), with a padded row a sample.
"""

import torch.nn.functional as F
from torch import Tensor


def splice(projected_PD: Tensor, embedding_VD: Tensor, token_ids_T: Tensor, text_rows: Tensor, patch_rows: Tensor) -> Tensor:
    """The packed hidden states [T, D], in projected's dtype.

    projected: [P, D]; embedding: [V, D] in any dtype; token_ids: int64 [T]; text_rows: int32, the rows that take
    `embedding[token_ids]`; patch_rows: int32 [P], the row of each patch, T for one that is cut. Each row of T is in
    text_rows or in patch_rows, once.
    """
    rows = token_ids_T.shape[0]
    text = text_rows.long()
    # One row more than T is the bin for patches that are cut: no shape depends on how many there are.
    hidden = projected_PD.new_zeros(rows + 1, embedding_VD.shape[1])
    hidden = hidden.index_copy(0, text, F.embedding(token_ids_T[text], embedding_VD).to(hidden.dtype))
    return hidden.index_copy(0, patch_rows.long(), projected_PD)[:rows]
