"""Which samples form step k, how they are packed, and what each supervised token weighs: pure integers, no I/O.

`step -> samples` depends on (seed, epoch, prepared set) alone, so the state of the whole data pipeline is the step's number.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fastllava.config import DataConfig, TrainConfig
from fastllava.errors import UserError


class Lengths(Protocol):
    """What a plan needs to know of N samples; a PreparedSet is one."""

    n_tokens: NDArray[np.int32]
    """[N] packed rows of the sample."""
    n_supervised: NDArray[np.int32]
    """[N] its targets in the loss."""
    length_key: NDArray[np.int32]
    """[N] its words, negative without an image: what the original's sampler groups by."""


@dataclass(frozen=True)
class Step:
    """One optimizer step. `samples` are in the recipe's order; the micro-batches hold each of them once."""

    index: int
    samples: NDArray[np.int64]
    """[B] sample numbers."""
    micro_batches: tuple[NDArray[np.int64], ...]
    """Positions in `samples` of each packed micro-batch, ascending."""
    weights: NDArray[np.float64]
    """[B] what one supervised token of the sample weighs in the step's loss."""


class Plan:
    """Every step of a run. Raises UserError when there is no sample."""

    def __init__(self, lengths: Lengths, data: DataConfig, train: TrainConfig) -> None:
        self.lengths, self.data, self.train = lengths, data, train
        self.n_samples = len(lengths.n_tokens)
        if not self.n_samples:
            raise UserError("data.records: no usable record; see quarantine.jsonl of the prepared set")
        self.steps_per_epoch = math.ceil(self.n_samples / train.global_batch)
        self.n_steps = train.max_steps or self.steps_per_epoch * train.epochs
        self._order = lru_cache(maxsize=2)(self._epoch_order)

    def step(self, index: int) -> Step:
        """Step `index`, 0-based. The last step of an epoch takes the samples that are left."""
        epoch, within = divmod(index, self.steps_per_epoch)
        start = within * self.train.global_batch
        samples = self._order(epoch)[start : start + self.train.global_batch]
        return Step(
            index=index,
            samples=samples,
            micro_batches=first_fit_decreasing(self.lengths.n_tokens[samples], self.train.micro_batch_tokens),
            weights=self._weights(self.lengths.n_supervised[samples]),
        )

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if not self.data.shuffle:
            return np.arange(self.n_samples)
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([self.train.seed, epoch]).generate_state(1)[0]))
        if not self.data.group_by_modality:
            return torch.randperm(self.n_samples, generator=generator).numpy()
        batch, world = self.train.reference_micro_batch, self.train.global_batch // self.train.reference_micro_batch
        if self.train.global_batch % self.train.reference_micro_batch:
            batch, world = self.train.global_batch, 1
        return np.array(group_by_modality(self.lengths.length_key.tolist(), batch, world, generator))

    def _weights(self, n_supervised: NDArray[np.int32]) -> NDArray[np.float64]:
        """loss_norm=token: the mean over the step's tokens. loss_norm=llava: the mean of the means of the original's micro-batches."""
        size = self.train.reference_micro_batch if self.train.loss_norm == "llava" else len(n_supervised)
        starts = range(0, len(n_supervised), size)
        cuts = [n_supervised[start : start + size] for start in starts]
        return np.concatenate([np.full(len(cut), 1.0 / (len(cuts) * max(1, int(cut.sum())))) for cut in cuts])


def first_fit_decreasing(n_tokens: NDArray[np.int32], budget: int) -> tuple[NDArray[np.int64], ...]:
    """Bins of positions whose tokens sum to at most `budget`; a sample longer than that has a bin of its own.

    First-fit decreasing (Johnson 1973), ties in order, so the same answer everywhere. Bins by their first position.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for position in np.argsort(-n_tokens.astype(np.int64), kind="stable").tolist():
        need = int(n_tokens[position])
        chosen = next((b for b, left in enumerate(room) if need <= left), None)
        if chosen is None:
            bins.append([])
            room.append(budget)
            chosen = len(bins) - 1
        bins[chosen].append(position)
        room[chosen] -= need
    return tuple(np.array(b) for b in sorted(sorted(b) for b in bins))


def group_by_modality(lengths: Sequence[int], batch: int, world: int, generator: torch.Generator) -> list[int]:
    """The original's order of samples (llava/train/llava_trainer.py, get_modality_length_grouped_indices).

    lengths: words per sample, negative for text only. Every `batch * world` consecutive samples are of one modality,
    apart from the last ones, with `world` chunks of `batch` that have about the same number of words.
    """
    if all(n > 0 for n in lengths) or all(n < 0 for n in lengths):
        return _group_by_length(range(len(lengths)), lengths.__getitem__, batch, world, generator)
    with_image = [i for i, n in enumerate(lengths) if n > 0]
    text_only = [i for i, n in enumerate(lengths) if n <= 0]
    size = batch * world
    groups = [
        _cut(_group_by_length(indices, lambda i: abs(lengths[i]), batch, world, generator), size) for indices in (with_image, text_only)
    ]
    whole = [group for modality in groups for group in modality[:-1]]
    left = sorted(i for modality in groups for i in modality[-1])
    return [i for g in torch.randperm(len(whole), generator=generator).tolist() for i in whole[g]] + left


def _group_by_length(indices: Sequence[int], length: Callable[[int], int], batch: int, world: int, generator: torch.Generator) -> list[int]:
    shuffled = [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]
    order = []
    for group in _cut(shuffled, batch * world):
        order += _even_chunks(sorted(group, key=length, reverse=True), length, world)
    return order


def _even_chunks(group: list[int], length: Callable[[int], int], world: int) -> list[int]:
    """`group`, longest first, dealt to `world` chunks of one size, each sample to the chunk with the fewest words so far."""
    if len(group) % world:
        return [i for rank in range(world) for i in group[rank::world]]
    size = len(group) // world
    chunks: list[list[int]] = [[] for _ in range(world)]
    totals = [0.0] * world
    for i in group:
        shortest = totals.index(min(totals))
        chunks[shortest].append(i)
        totals[shortest] = math.inf if len(chunks[shortest]) == size else totals[shortest] + length(i)
    return [i for chunk in chunks for i in chunk]


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
