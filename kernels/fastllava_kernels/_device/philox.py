"""Dropout whose mask is a function of numbers that name an element, so that it can be drawn again anywhere: in plain PyTorch.

Philox 4x32 with 7 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). The key of row t is keys[t], 64 bits; the
counter is (column // 8, low half of the stream, high half of the stream, 0); each of the four words that come out has 16 bits for each
of two columns, the low half first. T rows, D columns.
"""

import torch
from torch import Tensor

ROUNDS = 7
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
COLUMNS = 8
"""Columns that one counter draws for."""
LEVELS = 1 << 16
"""How many values the number of a column may have."""
_LOW = 0xFFFFFFFF


def threshold(dropout: float) -> int:
    """Return the number below which a column's number drops it: a probability of `threshold / LEVELS`."""
    return round(dropout * LEVELS)


def correction(below: int) -> float:
    """Return what kept elements are multiplied by, so that their expectation is what it was without dropout."""
    return LEVELS / (LEVELS - below)


def dropped(keys_T: Tensor, stream: Tensor, width: int, below: int) -> Tensor:
    """Tell which elements are dropped, bool [T, D]: those whose number is less than `below`.

    keys_T: int64 [T]; stream: int64 of one element; width: D.
    """
    first, second, third, fourth = words(keys_T, stream, -(-width // COLUMNS))
    # What stands above a word's 32 bits is shifted out or is 0.
    pairs = torch.stack((first | second << 32, third | fourth << 32), dim=-1)
    numbers = pairs.view(torch.int16).flatten(1)[:, :width]
    # Numbers from 2**15 on are negative in int16: with the highest bit turned over they are in their order.
    return (numbers ^ -(1 << 15)) < below - (1 << 15)


def words(keys_T: Tensor, stream: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words of counters 0 to blocks - 1 of each row: int64 [T, blocks], of the second and fourth the low 32 bits only."""
    keys = [(keys_T & _LOW)[:, None], (keys_T >> 32 & _LOW)[:, None]]
    counter = [torch.arange(blocks, device=keys_T.device)[None, :], stream & _LOW, stream >> 32 & _LOW, torch.zeros_like(keys[0])]
    for number in range(ROUNDS):
        if number:
            keys = [key + step & _LOW for key, step in zip(keys, KEY_STEPS, strict=True)]
        # Products of 32 by 32 bits; int64 holds all their bits, whatever it takes for their sign.
        even, odd = counter[0] * MULTIPLIERS[0], counter[2] * MULTIPLIERS[1]
        counter = [(odd >> 32 ^ counter[1] ^ keys[0]) & _LOW, odd, (even >> 32 ^ counter[3] ^ keys[1]) & _LOW, even]
    first, second, third, fourth = torch.broadcast_tensors(*counter)
    return first, second, third, fourth
