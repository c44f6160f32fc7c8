"""NF4, four-bit weights (Dettmers et al. 2023, arXiv 2305.14314): quantise and dequantise in plain PyTorch, bit-equal to bitsandbytes.

A weight is cut into blocks of 64 in its order in memory. Each has its largest magnitude as a scale (absmax), and for every weight the
nearest of 16 values between -1 and 1. With double quantisation the scales, less their mean, are kept in 8 bits, 256 of them to a scale
of their own: 4.127 bits a weight in place of 4.5.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64
"""Weights to a scale."""
NESTED_BLOCK = 256
"""Scales to a scale of their own."""
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""What the 16 codes stand for: quantiles of a normal distribution (appendix E of the paper)."""
_LEAST = 1e-38
"""The least that a weight is divided by."""
_GRID = 2**16
_PIECE = 2**20
"""Weights that are quantised or dequantised at a time, a multiple of BLOCK: what bounds the memory that takes."""


class Nf4(NamedTuple):
    """A quantised weight, none of whose tensors takes a gradient."""

    codes: Tensor
    """uint8, two codes a byte, the first in the high half: [F, D / 2] of a weight [F, D] whose rows are even, else [ceil(weights / 2)]."""
    absmax: Tensor
    """The scales, [blocks]: fp32, or uint8 where they are quantised too."""
    nested_absmax: Tensor
    """The scales of the scales, fp32 [ceil(blocks / 256)]; [0] where those are not quantised."""
    offset: Tensor
    """The mean of the scales, fp32 [1]; [0] likewise."""


def layers_of(tensors: Sequence[Tensor]) -> list[Tensor | Nf4]:
    """Return the weights of layers whose tensors stand one after another: a floating one, or the four of an Nf4."""
    found: list[Tensor | Nf4] = []
    place = 0
    while place < len(tensors):
        quantised = tensors[place].dtype is torch.uint8
        found.append(Nf4(*tensors[place : place + 4]) if quantised else tensors[place])
        place += 4 if quantised else 1
    return found


def quantise(weight: Tensor, double: bool = False) -> Nf4:
    """Quantise a weight of any shape in fp32, fp16 or bf16; `double`: its scales too. Raises ValueError where it is not finite."""
    flat = weight.detach().reshape(-1)
    count = flat.numel()
    codes = torch.empty(-(-count // 2), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-count // BLOCK), device=flat.device)
    for start in range(0, count, _PIECE):
        piece = flat[start : start + _PIECE].float()
        scaled, absmax[start // BLOCK : -(-(start + len(piece)) // BLOCK)] = _scaled(piece)
        # The last of an odd number has a zero beside it.
        found = torch.bucketize(_filled(scaled, 2), _bounds(flat.device), out_int32=True).to(torch.uint8)
        codes[start // 2 : (start + len(found)) // 2] = found[::2] << 4 | found[1::2]
    if not bool(absmax.isfinite().all()):
        raise ValueError("holds numbers that are not finite, which have no NF4")
    even = weight.ndim > 1 and weight.shape[-1] % 2 == 0
    packed = codes.view(*weight.shape[:-1], -1) if even and count else codes
    if not double:
        return Nf4(packed, absmax, absmax.new_empty(0), absmax.new_empty(0))
    return Nf4(packed, *_quantise_scales(absmax))


def dequantise(weight: Nf4, dtype: torch.dtype = torch.float32, shape: Sequence[int] | None = None) -> Tensor:
    """What the codes stand for, in `dtype`: the fp32 products of codes and scales, rounded once.

    shape: that of the weight, where its codes are not [F, D / 2].
    """
    codes, scale = weight.codes.reshape(-1), scales(weight)
    out = torch.empty(2 * codes.numel(), dtype=dtype, device=codes.device)
    for start in range(0, len(out), _PIECE):
        piece = out[start : start + _PIECE]
        values = unpacked(codes[start // 2 : (start + len(piece)) // 2])
        spread = scale[start // BLOCK : -(-(start + len(piece)) // BLOCK)].repeat_interleave(BLOCK)[: len(piece)]
        piece.copy_(values.mul_(spread))
    if shape is None:
        return out.view(*weight.codes.shape[:-1], 2 * weight.codes.shape[-1])
    count = torch.Size(shape).numel()
    return out[:count].view(shape)


def scales(weight: Nf4) -> Tensor:
    """Return the scale of each block, fp32 [blocks]."""
    if weight.absmax.dtype is not torch.uint8:
        return weight.absmax
    values = nested_code(weight.absmax.device).index_select(0, weight.absmax.int())
    spread = weight.nested_absmax.repeat_interleave(NESTED_BLOCK)[: len(values)]
    # Two roundings, as the scales are made and then added to.
    return values.mul_(spread).add_(weight.offset)


def unpacked(codes: Tensor) -> Tensor:
    """What each code of packed ones [bytes] stands for before it is scaled: fp32 [2 bytes]."""
    return _pairs(codes.device).index_select(0, codes.int()).view(-1)


def _scaled(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Return fp32 [weights] over the largest magnitude of each block, and these, fp32 [blocks].

    As bitsandbytes does it, a last block that is not full is divided by its scale, which is then no smaller than _LEAST; the
    others are multiplied by the scale's reciprocal.
    """
    whole = len(flat) // BLOCK * BLOCK
    blocks, rest = flat[:whole].view(-1, BLOCK), flat[whole:]
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp(min=_LEAST)).unsqueeze(1)).view(-1)
    if not len(rest):
        return scaled, absmax
    last = rest.abs().amax(0, keepdim=True).clamp(min=_LEAST)
    return torch.cat((scaled, rest / last)), torch.cat((absmax, last))


def _quantise_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales of the scales and their mean. Values are rounded to _GRID points first, as bitsandbytes does on a CPU."""
    offset = absmax.mean() if len(absmax) else absmax.new_zeros(())
    blocks = _filled(absmax - offset, NESTED_BLOCK).view(-1, NESTED_BLOCK)
    nested = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / nested).unsqueeze(1)).clamp(-1, 1)
    places = (scaled + 1) * 0.5 * (_GRID - 1) + 0.5
    # Scales that are all alike are nothing but their mean; their code, the first, is multiplied by 0.
    places = torch.where(nested.unsqueeze(1) > 0, places, 0.0).view(-1)[: len(absmax)]
    return _nested_codes(absmax.device).index_select(0, places.int()), nested, offset.view(1)


def _filled(flat: Tensor, size: int) -> Tensor:
    """Return `flat`, filled up with zeros to a multiple of `size`."""
    missing = -len(flat) % size
    return torch.cat((flat, flat.new_zeros(missing))) if missing else flat


@cache
def code(device: torch.device) -> Tensor:
    """Return CODE, fp32 [16]."""
    return torch.tensor(CODE, device=device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """Return what the two codes of each byte stand for, fp32 [256, 2]."""
    values = code(device)
    return torch.stack((values.repeat_interleave(16), values.repeat(16)), dim=1)


@cache
def nested_code(device: torch.device) -> Tensor:
    """Return what the 256 codes of quantised scales stand for, fp32, ascending: tenfold steps, each divided evenly (arXiv 1511.04561).

    There are 7 of them, 10^-6 to 1, the step 10^(n - 6) in 2^n parts, whose middles, of either sign, are the values; 0 and 1 besides.
    """
    values = [0.0, 1.0]
    for step in range(7):
        edges = torch.linspace(0.1, 1.0, 2**step + 1)
        middles = 10.0 ** (step - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values), device=device)


@cache
def _bounds(device: torch.device) -> Tensor:
    """Return what lies in the middle between neighbours of CODE, fp32 [15]; the middle itself belongs to the lower one."""
    values = code(device)
    return (values[:-1] + values[1:]) / 2


@cache
def _nested_codes(device: torch.device) -> Tensor:
    """Return the code of the value of `nested_code` that is nearest to each point of a grid over -1 to 1, uint8 [_GRID]."""
    values = nested_code(device)
    points = 2.0 * torch.arange(_GRID, dtype=torch.float32, device=device) / (_GRID - 1) - 1.0
    return torch.bucketize(points, (values[:-1] + values[1:]) / 2, out_int32=True).to(torch.uint8)
