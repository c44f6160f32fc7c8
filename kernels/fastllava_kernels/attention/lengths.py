"""Rows of each sample, for implementations that read them on the host."""

from itertools import pairwise

from torch import Tensor


def lengths_of(cu_seqlens: Tensor, rows: int) -> list[int]:
    """Return the rows of each sample. Raises ValueError when cu_seqlens does not cut the rows into samples one after another."""
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != rows or min(lengths, default=0) < 0:
        raise ValueError(f"attention: cu_seqlens rises from 0 to the number of rows, here {rows}; given {bounds}")
    return lengths
