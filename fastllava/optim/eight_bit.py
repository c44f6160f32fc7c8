"""Moments of AdamW in 8 bits, by torchao: a byte a value, and an fp32 scale a block. Imported only where a run wants them.

A value is one of 256 numbers between -1 and 1 (for squares between 0 and 1), dense towards 0, times the largest of its block
(Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861).
"""

import torch
from torch import Tensor
from torchao.optim.quant_utils import create_dynamic_map, dequant_with_qmap, quantize_8bit_with_qmap, scale_tensor

BLOCK = 256
"""Values that share a scale."""
_FEWEST = 4096
"""Values of the smallest tensor that is quantised; as in torchao and bitsandbytes."""
_NUMBERS = create_dynamic_map(signed=True), create_dynamic_map(signed=False)


def fits(tensor: Tensor) -> bool:
    """Whether moments of a parameter of this shape are quantised."""
    return tensor.numel() >= _FEWEST and tensor.numel() % BLOCK == 0


def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 256 numbers, fp32 and rising: with signs for means, without for squares."""
    signed, unsigned = (torch.tensor(numbers, dtype=torch.float32, device=device) for numbers in _NUMBERS)
    return signed, unsigned


def zeros(like: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, uint8 in the shape of `like`, and scales, fp32 [values / BLOCK], that together stand for zeros."""
    return torch.zeros_like(like, dtype=torch.uint8), torch.zeros(like.numel() // BLOCK, dtype=torch.float32, device=like.device)


def decode(codes: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """The values, fp32 in the shape of codes."""
    return dequant_with_qmap(codes, table, scale)


def encode(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, each of the number nearest to its value, and scales of fp32 `values` [n], n a multiple of BLOCK."""
    scaled, scale = scale_tensor(values, BLOCK)
    return quantize_8bit_with_qmap(scaled, table), scale
