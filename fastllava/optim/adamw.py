"""The arithmetic of one AdamW update on a piece of a parameter, as functions that torch.compile can make one kernel of.

All tensors are flat and of n values, in fp32 where nothing else is said; scalars are tensors on the same device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_MURMUR = (-2048144789, -1028477387)
"""0x85ebca6b and 0xc2b2ae35 as int32: the multipliers of MurmurHash3's finalizer (Appleby), which mixes every bit into every other."""


class Constants(NamedTuple):
    """AdamW's constants of a parameter group."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def moved(
    weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: Tensor, lr: Tensor, constants: Constants
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight in fp32, mean and square after this step, the `step`-th from 1 on (Loshchilov and Hutter, arXiv 1711.05101).

    weight and gradient come in any dtype.
    """
    beta1, beta2, eps, weight_decay = constants
    gradient = gradient.float()
    mean = mean.lerp(gradient, 1 - beta1)
    square = square.lerp(gradient * gradient, 1 - beta2)
    spread = square.sqrt() / (1 - beta2**step).sqrt() + eps
    weight = weight.float()
    return weight - lr * weight_decay * weight - lr * (mean / (1 - beta1**step)) / spread, mean, square


def rounded(weight: Tensor, salt: Tensor, step: Tensor) -> Tensor:
    """bf16: each of the finite fp32 `weight` as one of its two neighbours, each the likelier the nearer, so that the mean is right.

    Which one is a hash of its place, of `salt`, int32 scalar, and of `step`.
    """
    places = torch.arange(weight.shape[0], dtype=torch.int32, device=weight.device)
    noise = _mixed(places ^ _mixed(salt ^ _mixed(step.to(torch.int32)))) & 0xFFFF
    # bf16 is the upper half of fp32's bits: adding to the lower half carries over in proportion to what is there.
    return ((weight.view(torch.int32) + noise) & -0x10000).view(torch.float32).to(torch.bfloat16)


def _mixed(x: Tensor) -> Tensor:
    """int32 that depend on every bit of the int32 `x`; products wrap around."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _MURMUR[0]
    x = (x ^ ((x >> 13) & 0x7FFFF)) * _MURMUR[1]
    return x ^ ((x >> 16) & 0xFFFF)
