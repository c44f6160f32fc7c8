"""From a plan to packed micro-batches: stateless workers read rows, decode images and lay out a Batch.

Shape letters: T packed rows, S samples, I images, P patches per image, M supervised rows.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, get_worker_info

from fastllava.batch import IMAGE_ID, Batch, ImageSpec
from fastllava.config import DataConfig
from fastllava.data.checks import BadRecord
from fastllava.data.feed import Feed, Report, no_workers
from fastllava.data.images import ImageError, load_image, resolve_image
from fastllava.data.plan import Step
from fastllava.data.prepared import PreparedSet
from fastllava.data.row_keys import row_keys
from fastllava.data.workers import Board
from fastllava.disk import in_words
from fastllava.errors import UserError


@dataclass(frozen=True)
class Sample:
    """One sample before it is packed."""

    ids: NDArray[np.int32]
    """[n] token ids; IMAGE_ID where an image stands."""
    supervised: NDArray[np.int32]
    """[k, 2] half-open ranges into `ids`."""
    images: Sequence[NDArray[np.uint8]]
    """One uint8 [3, H, W] for each IMAGE_ID in `ids`."""
    weight: float
    """The weight of each supervised token in the step's loss."""


_NOTHING = Sample(np.zeros(1, np.int32), np.zeros((0, 2), np.int32), (), 0.0)


def pack(samples: Sequence[Sample], spec: ImageSpec, max_tokens: int) -> Batch:
    """Samples one after another in T rows: each image becomes P rows, then the sample is cut at `max_tokens` rows.

    Without a sample it is one row that is not supervised: a rank that goes without runs what the others run.
    As `prepare_inputs_labels_for_multimodal` of the original (llava/model/llava_arch.py) does for one padded row a
    sample. The loss of row t is that of the token in row t+1, so a sample's first token is never a target.
    """
    ids, positions, patch_rows, text_rows, rows, targets, weights = [], [], [], [], [], [], []
    starts = [0]
    for sample in samples or [_NOTHING]:
        offset = starts[-1]
        is_image = sample.ids == IMAGE_ID
        if int(is_image.sum()) != len(sample.images):
            raise ValueError(f"{len(sample.images)} images for {int(is_image.sum())} image markers")
        widths = np.where(is_image, spec.patches, 1)
        first_rows = np.cumsum(widths) - widths
        n_rows = min(int(widths.sum()), max_tokens)

        token_rows = first_rows[~is_image]
        kept = token_rows < n_rows
        row_ids = np.zeros(n_rows, np.int64)
        row_ids[token_rows[kept]] = sample.ids[~is_image][kept]
        patches = (first_rows[is_image][:, None] + np.arange(spec.patches)).ravel()

        supervised = np.zeros(len(sample.ids), bool)
        for begin, end in sample.supervised:
            supervised[begin:end] = True
        target_rows = first_rows[supervised]
        counted = (target_rows > 0) & (target_rows < n_rows)

        ids.append(row_ids)
        positions.append(np.arange(n_rows))
        text_rows.append(token_rows[kept] + offset)
        patch_rows.append(np.where(patches < n_rows, patches + offset, -1))
        rows.append(target_rows[counted] - 1 + offset)
        targets.append(sample.ids[supervised][counted])
        weights.append(np.full(int(counted.sum()), sample.weight))
        starts.append(offset + n_rows)

    total = starts[-1]
    all_patches = np.concatenate(patch_rows)
    images = [image for sample in samples for image in sample.images]
    pixels = np.stack(images) if images else np.zeros((0, 3, spec.size, spec.size), np.uint8)
    return Batch(
        token_ids=_tensor(np.concatenate(ids), torch.int64),
        position_ids=_tensor(np.concatenate(positions), torch.int64),
        cu_seqlens=_tensor(np.array(starts), torch.int32),
        max_seqlen=int(np.diff(starts).max()),
        pixels=torch.from_numpy(pixels),
        patch_rows=_tensor(np.where(all_patches < 0, total, all_patches), torch.int32),
        text_rows=_tensor(np.concatenate(text_rows), torch.int32),
        supervised_rows=_tensor(np.concatenate(rows), torch.int32),
        targets=_tensor(np.concatenate(targets), torch.int64),
        weights=_tensor(np.concatenate(weights), torch.float32),
    )


def _tensor(array: NDArray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(array).to(dtype)


@dataclass(frozen=True)
class BadImage:
    """A sample with an image that cannot be trained on any more."""

    sample: int
    """Its number in the prepared set."""
    id: str
    """The id of its record."""
    path: str
    """That of the image, of several the first."""
    reason: str

    def in_words(self) -> str:
        """The record, the image, and what is wrong with it."""
        return f"record {self.id}: {self.path}: {self.reason}"


class BadImages(UserError):
    """Samples of one step that cannot be read."""

    def __init__(self, found: Sequence[BadImage]) -> None:
        super().__init__("; ".join(one.in_words() for one in found))
        self.found = tuple(found)

    def __reduce__(self) -> tuple[type["BadImages"], tuple[tuple[BadImage, ...]]]:
        return BadImages, (self.found,)


@dataclass(frozen=True)
class _Job:
    """What a worker needs to build one micro-batch."""

    step: int
    samples: tuple[int, ...]
    weights: tuple[float, ...]


class _MicroBatches(Dataset):
    """Builds the micro-batch of a job. Holds no state, so a worker that dies loses nothing."""

    def __init__(self, prepared: PreparedSet, spec: ImageSpec, data: DataConfig, board: Board, seed: int | None) -> None:
        self.prepared, self.spec, self.data, self.board, self.seed = prepared, spec, data, board, seed

    def __getitem__(self, job: _Job) -> Batch | UserError:
        try:
            batch = self._build(job)
            # Here and not by the thread that sends it, whose errors nobody hears of: the main process would wait for ever.
            return batch if get_worker_info() is None else _shared(batch)
        except UserError as error:
            # Returned, not raised: what a worker raises reaches the main process wrapped in a traceback.
            return error

    def _build(self, job: _Job) -> Batch:
        samples: list[Sample] = []
        bad: list[BadImage] = []
        for index, weight in zip(job.samples, job.weights, strict=True):
            with self.board.at(index):
                try:
                    samples.append(read_sample(self.prepared, self.spec, self.data, index, weight))
                except BadImages as error:
                    bad += error.found
        if bad:
            raise BadImages(bad)
        batch = pack(samples, self.spec, self.data.max_tokens)
        if self.seed is None:
            return batch
        keys = row_keys(self.seed, job.step, job.samples or (-1,), np.diff(batch.cu_seqlens.numpy()).tolist())
        return replace(batch, row_keys=torch.from_numpy(keys))


def _shared(batch: Batch) -> Batch:
    try:
        return batch.share_memory()
    except RuntimeError as error:
        needed = in_words(sum(value.nbytes for value in vars(batch).values() if isinstance(value, torch.Tensor)))
        raise no_workers(f"a batch of {needed} finds no space in shared memory ({' '.join(str(error).split())[:160]})") from None


def read_sample(prepared: PreparedSet, spec: ImageSpec, data: DataConfig, index: int, weight: float) -> Sample:
    """Sample `index` with its images decoded. Raises BadImages when one of them has become bad: none is shown without the others."""
    row = prepared.row(index)
    images = []
    for image, stamp in zip(row.images, row.stamps, strict=True):
        if data.images is None:
            raise UserError(f"record {row.id}: has the image {image}, but data.images is not set")
        try:
            # The rules for paths hold at every read: what lies there now may be a link that leads elsewhere.
            path = resolve_image(data.images.resolve(), image, data.follow_links)
            images.append(load_image(path, data.image_policy, spec, data, stamp))
        except (BadRecord, ImageError) as problem:
            reason = f"{problem.detail} ({problem.reason})"
            raise BadImages([BadImage(index, row.id, str(data.images / image), reason)]) from None
    return Sample(row.ids, row.supervised, images, weight)


class Steps(Protocol):
    """What the loader needs of a plan."""

    @property
    def n_steps(self) -> int: ...

    def step(self, index: int) -> Step: ...


def steps(
    plan: Steps,
    first: int,
    prepared: PreparedSet,
    spec: ImageSpec,
    data: DataConfig,
    *,
    pin: bool,
    rank: int = 0,
    seed: int | None = None,
    board: Board | None = None,
    report: Report = print,
) -> Generator[tuple[Step, list[Batch]], None, None]:
    """Every step from number `first` to the plan's last, with the rank's micro-batches on the host (page-locked when `pin`).

    `seed`: what is drawn at random for a row is drawn by this too; None where nothing is.
    Workers build ahead of the consumer, and end when the generator is closed; what they read stands on `board`. One that dies is
    told to `report`, and started again. Raises BadImages, of all samples of a step, when images have become bad since they were prepared.
    """
    board = board or Board(data.workers)

    def jobs_from(place: tuple[int, int]) -> Iterator[_Job]:
        index, number = place
        return islice(_jobs(plan, index, rank), number, None)

    def said_of(sample: int) -> str:
        return f"record {prepared.row(sample).id}"

    micro_batches = _MicroBatches(prepared, spec, data, board, seed)
    feed = Feed[tuple[int, int]](micro_batches, jobs_from, (first, 0), data.workers, board, said_of, pin=pin, report=report)
    with closing(feed):
        for index in range(first, plan.n_steps):
            step = plan.step(index)
            batches: list[Batch] = []
            bad: list[BadImage] = []
            for number in range(len(step.micro_batches)):
                batch = feed.take((index, number))
                if isinstance(batch, BadImages):
                    bad += batch.found
                elif isinstance(batch, UserError):
                    raise batch
                else:
                    batches.append(batch)
            if bad:
                raise BadImages(bad)
            yield step, batches


def _jobs(plan: Steps, first: int, rank: int) -> Iterator[_Job]:
    for index in range(first, plan.n_steps):
        step = plan.step(index)
        for ranks in step.micro_batches:
            positions = ranks[rank]
            yield _Job(step.index, tuple(step.samples[positions].tolist()), tuple(step.weights[positions].tolist()))
