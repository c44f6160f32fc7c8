"""How the samples of a step lie on ranks and micro-batches, so that no rank waits for another: pure integers, no I/O.

Letters: M micro-batches of the step, R ranks.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

MicroBatches = tuple[tuple[NDArray[np.int64], ...], ...]
"""`[m][r]`: positions in the step's samples, ascending, that rank r has in micro-batch m; none for a rank that goes without."""

_EVEN = 1.001
"""Heaviest bin over mean from which on more swaps are not worth their time."""
_PARTNERS = 4
"""Light bins that are tried as the heaviest one's partner before it counts as the best there is."""


@dataclass(frozen=True)
class Cost:
    """The operations that a sample takes are linear in four things that are known of it. Integers, so the same everywhere."""

    per_row: int
    """Packed row: the matrix products of the decoder."""
    per_pair: int
    """(query, key) pair of causal attention."""
    per_image: int
    """Tower and projector."""
    per_supervised: int
    """Supervised row: the head, and what runs for such rows only."""

    def of(self, n_tokens: ArrayLike, n_images: ArrayLike, n_supervised: ArrayLike) -> NDArray[np.int64]:
        """[N] operations of samples with [N] rows, images and supervised rows; exact below 2^63."""
        rows, images, supervised = (np.asarray(values, dtype=np.int64) for values in (n_tokens, n_images, n_supervised))
        pairs = rows * (rows + 1) // 2
        return self.per_row * rows + self.per_pair * pairs + self.per_image * images + self.per_supervised * supervised


def balance(n_tokens: NDArray[np.int32], cost: NDArray[np.int64], budget: int, world: int) -> MicroBatches:
    """Deal samples of [B] rows and [B] operations to `world` ranks in the fewest micro-batches found.

    No rank's rows in a micro-batch exceed `budget`, but for a sample longer than that, which is alone. Within each micro-batch
    the ranks' operations are about equal. Longest processing time first (Graham 1969), then swaps between the heaviest bin and
    light ones; first-fit decreasing (Johnson 1973) where space is too short for that. Ties go by position: one answer everywhere.
    """
    rows, work = n_tokens.tolist(), cost.tolist()
    bins = _first_fit(rows, budget)
    count = _ceil(len(bins), world) * world
    bins += [[] for _ in range(count - len(bins))]
    # An even spread needs more space than first fit, as a rule; now and then it finds a place for all in less.
    while count and (spread := _longest_first(rows, work, budget, count)) is not None:
        bins, count = spread, count - world
    if world > 1:
        _swap(bins, np.array(rows), np.array(work), budget)
    # Bins of like weight share a micro-batch; ranks take turns at its heavier end.
    bins.sort(key=lambda chosen: (-sum(work[i] for i in chosen), min(chosen, default=len(rows))))
    groups = [bins[start : start + world] for start in range(0, len(bins), world)]
    return tuple(
        tuple(np.array(sorted(chosen), dtype=np.int64) for chosen in (group if m % 2 == 0 else reversed(group)))
        for m, group in enumerate(groups)
    )


def _longest_first(rows: list[int], work: list[int], budget: int, count: int) -> list[list[int]] | None:
    """Each sample, most work first, to the bin with the least so far that has space; None where one has no place."""
    bins: list[list[int]] = [[] for _ in range(count)]
    filled, loads = [0] * count, [0] * count
    for i in sorted(range(len(rows)), key=lambda i: -work[i]):
        open_to = [b for b in range(count) if filled[b] + rows[i] <= budget or not bins[b]]
        if not open_to:
            return None
        lightest = min(open_to, key=loads.__getitem__)
        bins[lightest].append(i)
        filled[lightest] += rows[i]
        loads[lightest] += work[i]
    return bins


def _first_fit(rows: list[int], budget: int) -> list[list[int]]:
    """Each sample, longest first, to the first bin that has space."""
    bins: list[list[int]] = []
    space: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: -rows[i]):
        first = next((b for b, left in enumerate(space) if rows[i] <= left), len(bins))
        if first == len(bins):
            bins.append([])
            space.append(budget)
        bins[first].append(i)
        space[first] -= rows[i]
    return bins


def _swap(bins: list[list[int]], rows: NDArray[np.int64], work: NDArray[np.int64], budget: int) -> None:
    """Make the heaviest bin lighter, by a swap or a move, as long as that helps; in place."""
    loads = np.array([work[chosen].sum() for chosen in bins])
    space = budget - np.array([rows[chosen].sum() for chosen in bins])
    even = _EVEN * int(loads.sum()) / len(bins)
    for _ in range(8 * len(bins)):
        heavy = int(loads.argmax())
        if loads[heavy] <= even:
            return
        for light in np.argsort(loads, kind="stable")[:_PARTNERS].tolist():
            given, taken = np.array(bins[heavy]), np.array([*bins[light], -1])
            # The last column is a move: a sample of no rows and no work comes back.
            more_work = work[given][:, None] - np.append(work[taken[:-1]], 0)
            more_rows = rows[given][:, None] - np.append(rows[taken[:-1]], 0)
            gap = int(loads[heavy] - loads[light])
            left = np.abs(gap - 2 * more_work)
            left[(more_rows > space[light]) | (-more_rows > space[heavy])] = gap
            best = int(left.argmin())
            if left.flat[best] < gap:
                break
        else:
            return
        g, t = divmod(best, len(taken))
        bins[heavy][g : g + 1] = taken[t : t + 1].tolist() if taken[t] >= 0 else []
        bins[light][t : t + 1] = [int(given[g])]
        for b, sign in ((heavy, -1), (light, 1)):
            loads[b] += sign * more_work[g, t]
            space[b] -= sign * more_rows[g, t]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
