"""Reference of layer_norm (Ba et al. 2016, arXiv 1607.06450)."""

import torch.nn.functional as F
from torch import Tensor


def layer_norm(x_ND: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """[..., D] in x's dtype: `weight * (x - mean) / sqrt(var + eps) + bias`, biased variance."""
    return F.layer_norm(x_ND, weight_D.shape, weight_D, bias_D, eps)
