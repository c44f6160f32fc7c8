"""The held-out set of a run: records that no step trains on, and the loss of a model on them.

The loss is in nats a supervised token, the mean over all of them, whatever `train.loss_norm` is: by the model's own packed forward, in the
run's precision, without gradients. Every process computes its share, in as many micro-batches as every other.
"""

import hashlib
import math
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fastllava.batch import Batch, ImageSpec
from fastllava.config import Config, DataConfig
from fastllava.console.speaker import Say
from fastllava.data.balance import Cost
from fastllava.data.loader import BadImage, BadImages, steps
from fastllava.data.plan import Plan, Step, held_out_of
from fastllava.data.prepared import PreparedSet
from fastllava.data.workers import Board
from fastllava.distributed.processes import Processes
from fastllava.distributed.sharding import Sharding
from fastllava.errors import UserError
from fastllava.model.llava import Llava
from fastllava.train.state import set_aside

_FEW = 32
"""Samples that are read in less time than data workers take to start."""


class Lockstep(Protocol):
    """How the processes of a run evaluate together."""

    def fetching(self) -> None:
        """Note that this process waits for data from here on."""
        ...

    def computing(self) -> AbstractContextManager[None]:
        """A block that all run at once, within which none may leave the others alone."""
        ...

    def agree(self, failed: Exception | None = None, mine: bool = False) -> bool:
        """Whether any process says yes. Raises what one `failed` with on all, and Stopped where one was asked to stop."""
        ...


@dataclass(frozen=True)
class HeldOut:
    """Samples that are not trained on."""

    prepared: PreparedSet
    samples: NDArray[np.int64]
    """Their numbers in `prepared`, ascending."""
    of_records: bool
    """Whether they were taken out of `data.records`."""

    @property
    def name(self) -> str:
        """A short hash of which samples these are: losses of one name can be compared."""
        return hashlib.sha256(self.prepared.digest.encode() + self.samples.tobytes()).hexdigest()[:12]


@dataclass(frozen=True)
class HeldOutLoss:
    """What came of an evaluation."""

    loss: float | None
    """Nats a supervised token; None where no sample is left or the loss is not finite."""
    samples: int
    tokens: int
    """Supervised ones."""


def find_held_out(config: Config, prepared: PreparedSet, own: PreparedSet | None) -> HeldOut | None:
    """The held-out set of a run on `prepared`; `own` is the prepared set of the file that `eval.held_out` names."""
    if own is not None:
        return HeldOut(own, np.arange(len(own)), of_records=False)
    if config.eval.share is None:
        return None
    taken = held_out_of(len(prepared), config.eval.share, config.train.seed)
    if not len(taken):
        raise UserError(f"eval.held_out: no share can be taken of {len(prepared)} usable record; give more records, or a file of others")
    return HeldOut(prepared, taken, of_records=True)


def announce_held_out(held: HeldOut, plan: Plan, trained: PreparedSet, say: Say) -> None:
    """Say what is held out, and how much of it is trained on nevertheless, under another name."""
    tokens = int(held.prepared.n_supervised[held.samples].sum())
    whence = "taken out of data.records" if held.of_records else "of a file of their own"
    say(f"held out: {len(held.samples):,} samples {whence}, {tokens:,} supervised tokens")
    if (known := twins(held, plan, trained)) > 0:
        say(f"note: {known:,} of the held-out samples are word for word trained on too, so their loss falls for that reason alone")


def twins(held: HeldOut, plan: Plan, trained: PreparedSet) -> int:
    """How many held-out samples have the same ids and the same images as one that is trained on."""

    def looks(prepared: PreparedSet, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        # What is cheap to compare for all: few pairs are alike in it that are not alike.
        columns = prepared.n_tokens, prepared.n_supervised, prepared.length_key, prepared.sample_bytes()
        return np.stack([column[samples].astype(np.int64) for column in columns], axis=1)

    def content(prepared: PreparedSet, sample: int) -> tuple[bytes, tuple[str, ...]]:
        row = prepared.row(sample)
        return row.ids.tobytes(), row.images

    mine = looks(held.prepared, held.samples)
    wanted = set(map(tuple, mine.tolist()))
    candidates = [i for i, look in zip(plan.trained.tolist(), looks(trained, plan.trained).tolist(), strict=True) if tuple(look) in wanted]
    known = {content(trained, i) for i in candidates}
    return sum(content(held.prepared, i) in known for i in held.samples.tolist())


class Portions:
    """The held-out set as the loader reads it: portions of `train.global_batch` samples, each token of weight 1."""

    def __init__(self, held: HeldOut, config: Config, cost: Cost, world: int) -> None:
        data = config.data.model_copy(update={"shuffle": False, "group_by_modality": False})
        train = config.train.model_copy(update={"max_steps": None, "epochs": 1, "loss_norm": "token"})
        others = np.setdiff1d(np.arange(len(held.prepared)), held.samples)
        self.plan = Plan(held.prepared, data, train, cost, world, held_out=others)

    @property
    def n_steps(self) -> int:
        """How many portions there are."""
        return self.plan.n_steps

    def step(self, index: int) -> Step:
        """Portion `index`, without the samples that are left out."""
        step = self.plan.step(index)
        return replace(step, weights=np.ones(len(step.samples)))

    def counts(self) -> tuple[int, int]:
        """Samples, and their supervised tokens."""
        samples = np.concatenate(self.plan.samples_of(self.n_steps))
        return len(samples), int(self.plan.lengths.n_supervised[samples].sum())


class HeldOutEvaluation:
    """Computes the held-out loss, as often as it is asked to. A sample whose image cannot be read any more is left out from then on."""

    def __init__(
        self, held: HeldOut, config: Config, spec: ImageSpec, cost: Cost, device: torch.device, group: Processes, say: Say, report: Say
    ) -> None:
        """`say` speaks on the first process alone, `report` on this one."""
        self.held, self.board = held, Board(config.data.workers)
        self._portions = Portions(held, config, cost, group.world)
        few = len(held.samples) <= _FEW
        self._data: DataConfig = config.data.model_copy(update={"workers": 0}) if few else config.data
        self._spec, self._device, self._group, self._say, self._report = spec, device, group, say, report

    @torch.no_grad()
    def loss(self, model: Llava, sharding: Sharding, lockstep: Lockstep) -> HeldOutLoss:
        """The loss of `model`, on all processes together. Raises UserError when no image can be read at all."""
        total, index = torch.zeros((), dtype=torch.float64, device=self._device), 0
        with ExitStack() as streams:
            stream = streams.enter_context(closing(self._stream(index)))
            while index < self._portions.n_steps:
                batches, bad, failed = [], (), None
                lockstep.fetching()
                try:
                    _, batches = next(stream)
                except BadImages as error:
                    bad = error.found
                except Exception as error:
                    failed = error
                if lockstep.agree(failed, bool(bad)):
                    self._leave_out(bad, index)
                    streams.close()
                    stream = streams.enter_context(closing(self._stream(index)))
                    continue
                with lockstep.computing():
                    for batch in batches:
                        total += model(batch.to(self._device)).double()
                    # So that the host is not ahead of a GPU by more than a portion.
                    float(total)
                index += 1
        with lockstep.computing():
            summed = float(sharding.total(total))
        samples, tokens = self._portions.counts()
        return HeldOutLoss(summed / tokens if tokens and math.isfinite(summed) else None, samples, tokens)

    def _stream(self, first: int) -> Generator[tuple[Step, list[Batch]], None, None]:
        options = {"pin": self._device.type == "cuda", "rank": self._group.rank, "board": self.board, "report": self._report}
        return steps(self._portions, first, self.held.prepared, self._spec, self._data, **options)

    def _leave_out(self, mine: Sequence[BadImage], index: int) -> None:
        """Go on without the samples of a portion that any process could not read."""
        step = self._portions.step(index)
        positions = [i for ranks in step.micro_batches for i in ranks[self._group.rank].tolist()]
        read = int((self.held.prepared.n_images[step.samples[positions]] > 0).sum())
        bad = set_aside.found_by_any(self._group, self._data.images, mine, read)
        self._portions.plan.leave_out({one.sample: 0 for one in bad})
        for one in bad:
            self._say(f"held out no more, as it cannot be read: {one.in_words()}")
