"""Every random choice of a mix: a hash of the seed, the source and what is chosen for.

So a choice depends on nothing that was drawn before it.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


class Draw:
    """The choices of one source."""

    def __init__(self, seed: int, name: str) -> None:
        self._begin = blake2b(f"{seed}\0{name}".encode(), digest_size=8)

    def number(self, *key: object) -> int:
        """A number of 64 bits that is drawn for `key`."""
        hashed = self._begin.copy()
        hashed.update("\0".join(["", *map(str, key)]).encode("utf-8", "surrogatepass"))
        return int.from_bytes(hashed.digest(), "little")

    def below(self, bound: int, *key: object) -> int:
        """A number from 0 to `bound` - 1."""
        return self.number(*key) % bound

    def one(self, items: Sequence[T], *key: object) -> T:
        """One of the items."""
        return items[self.below(len(items), *key)]

    def some(self, items: Sequence[T], most: int, *key: object) -> list[T]:
        """All items, or `most` of them, in their order."""
        if len(items) <= most:
            return list(items)
        chosen = sorted(range(len(items)), key=lambda index: self.number(*key, index))[:most]
        return [items[index] for index in sorted(chosen)]

    def indexes(self, count: int, *key: object) -> NDArray[np.int64]:
        """The numbers below `count` in an order that is drawn."""
        drawn = np.fromiter((self.number(*key, index) for index in range(count)), np.uint64, count)
        return np.argsort(drawn, kind="stable")
