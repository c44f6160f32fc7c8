"""The dropout of `philox` inside Triton kernels: the same elements are kept, bit for bit."""

from typing import Any

import triton
import triton.language as tl

from fastllava_kernels._device import philox

_ROUNDS = tl.constexpr(philox.ROUNDS)


@triton.jit
def kept(keys, stream, first, below, COLUMNS: tl.constexpr) -> Any:
    """Tell which elements are kept: bool [rows, COLUMNS] of rows with these keys, int64 [rows], from column `first` on, a multiple of 8.

    stream: int64; below: the threshold.
    """
    ROWS: tl.constexpr = keys.shape[0]
    k0 = (keys & 0xFFFFFFFF).to(tl.uint32)[:, None]
    k1 = (keys >> 32 & 0xFFFFFFFF).to(tl.uint32)[:, None]
    c0 = (first // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)[None, :]
    c1 = (stream & 0xFFFFFFFF).to(tl.uint32)
    c2 = (stream >> 32 & 0xFFFFFFFF).to(tl.uint32)
    c3 = tl.zeros((1, 1), tl.uint32)
    # What is the same for all columns or all rows has one column or one row: much of the first two rounds.
    for _ in tl.static_range(_ROUNDS):  # pyright: ignore[reportGeneralTypeIssues]
        even = c0.to(tl.uint64) * 0xD2511F53
        odd = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (odd >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (even >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = (odd & 0xFFFFFFFF).to(tl.uint32)
        c3 = (even & 0xFFFFFFFF).to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    # The first and third words, then the second and fourth, then of each the low and the high half: neighbours in a thread, no exchange.
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    numbers = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(numbers, (ROWS, COLUMNS)).to(tl.int32) >= below
