"""A number for each row of a packed batch, by which everything that a step draws at random for the row is drawn.

It depends on the seed, the step, the sample and the row's place in the sample, and on nothing else: however samples are packed, cut into
micro-batches and dealt to processes, and wherever a run was resumed, a row draws the same.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MASK = 2**64 - 1


def row_keys(seed: int, step: int, samples: Sequence[int], lengths: Sequence[int]) -> NDArray[np.int64]:
    """int64 [T]: the keys of samples of these numbers in the prepared set, `lengths` rows each, one after another."""
    with np.errstate(over="ignore"):
        start = _mixed(np.array([seed & _MASK], np.uint64))
        start = _mixed(start ^ np.uint64(step))
        of_samples = _mixed(start ^ np.asarray(samples, np.int64).astype(np.uint64))
        positions = np.concatenate([np.arange(length, dtype=np.uint64) for length in lengths])
        return _mixed(np.repeat(of_samples, lengths) ^ positions).view(np.int64)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The next output of SplitMix64 in state x (Steele, Lea and Flood 2014): a bijection in which every bit depends on every bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
