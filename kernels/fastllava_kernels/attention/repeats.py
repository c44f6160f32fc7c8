"""Whether an implementation of attention gives the same bits for the same input."""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

_LENGTHS = (700, 1, 333, 64, 128, 500, 17, 257)
"""Rows of the samples: several blocks of a kernel each, whose parts of a gradient may meet in any order."""
_HEADS, _KEY_HEADS = 16, 4
_TIMES = 4


def repeats(attention: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether output and gradients of one input, with heads this wide, are the same bits four times over. It waits for the device."""
    generator = torch.Generator().manual_seed(0)
    heads = (_HEADS, _KEY_HEADS, _KEY_HEADS, _HEADS)
    q_THK, k_TGK, v_TGK, grad_THK = (torch.randn(sum(_LENGTHS), n, width, generator=generator).to(device, dtype) for n in heads)
    bounds = torch.tensor([*accumulate(_LENGTHS, initial=0)], dtype=torch.int32, device=device)

    def once() -> list[Tensor]:
        given = [x.detach().requires_grad_() for x in (q_THK, k_TGK, v_TGK)]
        out_THK = attention(*given, bounds, max(_LENGTHS), True)
        return [out_THK.detach(), *torch.autograd.grad(out_THK, given, grad_THK)]

    first = once()
    return all(torch.equal(one, other) for _ in range(_TIMES - 1) for one, other in zip(first, once(), strict=True))
