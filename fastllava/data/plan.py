"""Which samples form step k, how they lie on ranks and micro-batches, and what each supervised token weighs; no I/O.

`step -> samples` depends on (seed, epoch, prepared set) alone, so the state of the whole data pipeline is the step's number.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fastllava.config import DataConfig, TrainConfig
from fastllava.data.balance import Cost, MicroBatches, balance
from fastllava.errors import UserError

_HELD_OUT = 1
"""Sets the draw of held-out samples apart from others with the same seed."""


class Lengths(Protocol):
    """What a plan needs to know of N samples; a PreparedSet is one."""

    n_tokens: NDArray[np.int32]
    """[N] packed rows of the sample."""
    n_supervised: NDArray[np.int32]
    """[N] its targets in the loss."""
    n_images: NDArray[np.int8]
    """[N] its images."""
    length_key: NDArray[np.int32]
    """[N] its words, negative without an image: what the original's sampler groups by."""


@dataclass
class SampleLengths:
    """Lengths in memory."""

    n_tokens: NDArray[np.int32]
    n_supervised: NDArray[np.int32]
    n_images: NDArray[np.int8]
    length_key: NDArray[np.int32]

    @classmethod
    def of(cls, lengths: Lengths, samples: NDArray[np.int64]) -> "SampleLengths":
        """The lengths of these samples of a set, in this order."""
        columns = lengths.n_tokens, lengths.n_supervised, lengths.n_images, lengths.length_key
        return cls(*(column[samples] for column in columns))  # pyright: ignore[reportArgumentType] (each of its own dtype)


@dataclass(frozen=True)
class Step:
    """One optimizer step. `samples` are in the recipe's order; the micro-batches hold each of them once."""

    index: int
    samples: NDArray[np.int64]
    """[B] sample numbers."""
    micro_batches: MicroBatches
    """`[m][r]`: positions in `samples` of micro-batch m on rank r, ascending; perhaps none. Every rank has every m."""
    weights: NDArray[np.float64]
    """[B] what one supervised token of the sample weighs in the step's loss."""

    @property
    def empty(self) -> int:
        """Micro-batches of a rank without a sample; each is computed as one row."""
        return sum(not len(positions) for ranks in self.micro_batches for positions in ranks)


@dataclass(frozen=True)
class Figures:
    """How well some steps are packed."""

    micro_batches: float
    """A step's, on average."""
    imbalance: float
    """Work of the heaviest rank of each micro-batch over the ranks' mean, both summed over the micro-batches: 1 where none waits."""
    padding_share: float
    """The share of the rows computed that no sample has."""


def held_out_of(count: int, share: float | None, seed: int) -> NDArray[np.int64]:
    """Numbers of the samples, of `count`, that a share of them is, ascending: one at least, and never all. None where there is no share.

    They depend on the arguments alone, and are drawn apart from the order of an epoch.
    """
    if share is None or count < 2:
        return np.zeros(0, np.int64)
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, count, _HELD_OUT]).generate_state(1)[0]))
    drawn = torch.randperm(count, generator=generator)[: min(max(1, round(share * count)), count - 1)]
    return np.sort(drawn.numpy())


class Plan:
    """Every step of a run on `world` ranks; the samples of a step are the same for any. Raises UserError when there is no sample.

    Those `held_out` are in no step, and the others as if they were not in the set.
    """

    def __init__(
        self,
        lengths: Lengths,
        data: DataConfig,
        train: TrainConfig,
        cost: Cost,
        world: int = 1,
        held_out: NDArray[np.int64] | None = None,
    ) -> None:
        self.lengths, self.data, self.train, self.cost, self.world = lengths, data, train, cost, world
        every = np.arange(len(lengths.n_tokens))
        self.trained = every if held_out is None else np.delete(every, held_out)
        """[N] numbers of the samples that are trained on, ascending."""
        self.n_samples = len(self.trained)
        if not self.n_samples:
            raise UserError("data.records: no usable record; see quarantine.jsonl of the prepared set")
        self.steps_per_epoch = math.ceil(self.n_samples / train.global_batch)
        self.n_steps = train.max_steps or self.steps_per_epoch * train.epochs
        self._order = lru_cache(maxsize=2)(self._epoch_order)
        self.left_out: dict[int, int] = {}
        """The step from which on a sample is in none, by the sample's number."""
        # The loader asks for a step as its workers begin it, and again as the training comes to it.
        self._step = lru_cache(maxsize=64)(self._build)

    def step(self, index: int) -> Step:
        """Step `index`, 0-based. The last step of an epoch takes the samples that are left."""
        return self._step(index)

    def leave_out(self, since: Mapping[int, int]) -> None:
        """Besides those already left out, leave each of these samples out from the step on that is given for it."""
        self.left_out |= since
        self._step.cache_clear()

    def part(self, index: int, start: int, count: int) -> Step:
        """Step `index` with only the `count` of its samples from position `start` on, packed and weighed as a step of so many."""
        return self._of(index, self.step(index).samples[start : start + count])

    def samples_of(self, steps: int) -> list[NDArray[np.int64]]:
        """All samples of the first `steps` steps, an array an epoch. A whole epoch's are in the order of the set."""
        epochs, within = divmod(steps, self.steps_per_epoch)
        whole = [self._without(epoch, self.trained) for epoch in range(epochs)]
        return [*whole, self._without(epochs, self._order(epochs)[: within * self.train.global_batch])] if within else whole

    def work(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """[B] operations of these samples, by the plan's cost."""
        lengths = self.lengths
        return self.cost.of(lengths.n_tokens[samples], lengths.n_images[samples], lengths.n_supervised[samples])

    def figures(self, indices: Sequence[int]) -> Figures:
        """The figures of the steps with these numbers."""
        heaviest = total = rows = empty = count = 0
        for step in map(self.step, indices):
            work = self.work(step.samples)
            loads = [[int(work[positions].sum()) for positions in ranks] for ranks in step.micro_batches]
            heaviest += sum(map(max, loads))
            total += sum(map(sum, loads))
            rows += int(self.lengths.n_tokens[step.samples].sum())
            empty += step.empty
            count += len(loads)
        return Figures(count / len(indices), heaviest * self.world / total, empty / (rows + empty))

    def _build(self, index: int) -> Step:
        epoch, within = divmod(index, self.steps_per_epoch)
        start = within * self.train.global_batch
        samples = self._order(epoch)[start : start + self.train.global_batch]
        return self._of(index, samples, np.array([self.left_out.get(i, index + 1) > index for i in samples.tolist()]))

    def _of(self, index: int, samples: NDArray[np.int64], kept: NDArray[np.bool_] | None = None) -> Step:
        """The step of the samples that the recipe gives it, or of the `kept` ones among them."""
        kept = np.ones(len(samples), bool) if kept is None else kept
        weights = self._weights(self.lengths.n_supervised[samples], kept)
        samples = samples[kept]
        if not len(samples):
            nothing = np.zeros(0, np.int64)
            return Step(index, samples, ((nothing,) * self.world,), weights)
        return Step(
            index=index,
            samples=samples,
            micro_batches=balance(self.lengths.n_tokens[samples], self.work(samples), self.train.micro_batch_tokens, self.world),
            weights=weights,
        )

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        return self.trained[self._order_of_trained(epoch)]

    def _order_of_trained(self, epoch: int) -> NDArray[np.int64]:
        if not self.data.shuffle:
            return np.arange(self.n_samples)
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([self.train.seed, epoch]).generate_state(1)[0]))
        if not self.data.group_by_modality:
            return torch.randperm(self.n_samples, generator=generator).numpy()
        batch, world = self.train.reference_micro_batch, self.train.global_batch // self.train.reference_micro_batch
        if self.train.global_batch % self.train.reference_micro_batch:
            batch, world = self.train.global_batch, 1
        return np.array(group_by_modality(self.lengths.length_key[self.trained].tolist(), batch, world, generator))

    def _without(self, epoch: int, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of `samples` that are in their step of `epoch`."""
        begin, end = epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch
        gone = [i for i, since in self.left_out.items() if since < end]
        if not gone:
            return samples
        order = self._order(epoch)
        places = np.flatnonzero(np.isin(order, gone)).tolist()
        out = [i for i, at in ((int(order[at]), at) for at in places) if begin + at // self.train.global_batch >= self.left_out[i]]
        return samples[~np.isin(samples, out)]

    def _weights(self, n_supervised: NDArray[np.int32], kept: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The weights of the `kept` samples of a step. A micro-batch that has lost all of its samples does not count.

        loss_norm=token: the mean over the step's tokens. loss_norm=llava: the mean of the means of the original's micro-batches.
        """
        size = self.train.reference_micro_batch if self.train.loss_norm == "llava" else len(n_supervised)
        starts = range(0, len(n_supervised), size)
        cuts = [cut for start in starts if len(cut := n_supervised[start : start + size][kept[start : start + size]])]
        if not cuts:
            return np.zeros(0)
        return np.concatenate([np.full(len(cut), 1.0 / (len(cuts) * max(1, int(cut.sum())))) for cut in cuts])


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
