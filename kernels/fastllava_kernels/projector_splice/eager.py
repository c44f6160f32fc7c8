"""The steps of projector_splice in plain PyTorch, on any device: deterministic and without a sync."""

from torch import Tensor

from fastllava_kernels._device.plain import embedding_gradient, gather_rows, gelu_backward, linear, linear_gelu
from fastllava_kernels.splice.reference import splice

__all__ = ["embedding_gradient", "gather_rows", "gelu_backward", "linear_gelu", "place"]


def place(
    x_PC: Tensor,
    weight_DC: Tensor | None,
    bias_D: Tensor | None,
    embedding_VD: Tensor,
    token_ids_T: Tensor,
    text_rows: Tensor,
    patch_rows: Tensor,
) -> Tensor:
    """Compute the packed hidden states [T, D]: the last Linear's rows, or x itself without one, beside the text."""
    projected_PD = x_PC if weight_DC is None or bias_D is None else linear(x_PC, weight_DC, bias_D)
    return splice(projected_PD, embedding_VD, token_ids_T, text_rows, patch_rows)
