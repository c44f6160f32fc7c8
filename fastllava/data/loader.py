"""From a plan to packed micro-batches: stateless workers read rows, decode images and lay out a Batch.

Shape letters: T packed rows, S samples, I images, P patches per image, M supervised rows.
"""

import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from fastllava.batch import IMAGE_ID, Batch, ImageSpec
from fastllava.config import DataConfig
from fastllava.data.images import load_image
from fastllava.data.plan import Step
from fastllava.data.prepared import PreparedSet
from fastllava.errors import UserError

_DEATH_SECONDS = 2.0


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
    """Of each supervised token in the step's loss."""


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
class _Job:
    """What a worker needs to build one micro-batch."""

    samples: tuple[int, ...]
    weights: tuple[float, ...]


class _MicroBatches(Dataset):
    """Builds the micro-batch of a job. Holds no state, so a worker that dies loses nothing."""

    def __init__(self, prepared: PreparedSet, spec: ImageSpec, data: DataConfig) -> None:
        self.prepared, self.spec, self.data = prepared, spec, data

    def __getitem__(self, job: _Job) -> Batch | UserError:
        try:
            return self._build(job)
        except UserError as error:
            # Returned, not raised: what a worker raises reaches the main process wrapped in a traceback.
            return error

    def _build(self, job: _Job) -> Batch:
        samples = [read_sample(self.prepared, self.spec, self.data, i, w) for i, w in zip(job.samples, job.weights, strict=True)]
        return pack(samples, self.spec, self.data.max_tokens)


def read_sample(prepared: PreparedSet, spec: ImageSpec, data: DataConfig, index: int, weight: float) -> Sample:
    """Sample `index` with its image decoded. Raises UserError that names the record when that has become unreadable."""
    row = prepared.row(index)
    images = []
    if row.image is not None:
        if data.images is None:
            raise UserError(f"record {row.id}: has the image {row.image}, but data.images is not set")
        try:
            images.append(load_image(data.images / row.image, data.image_policy, spec, data))
        except UserError as error:
            raise UserError(f"record {row.id}: its image was readable when the data was prepared and is not now: {error}") from None
    return Sample(row.ids, row.supervised, images, weight)


class Steps(Protocol):
    """What the loader needs of a plan."""

    @property
    def n_steps(self) -> int: ...

    def step(self, index: int) -> Step: ...


def steps(
    plan: Steps, first: int, prepared: PreparedSet, spec: ImageSpec, data: DataConfig, *, pin: bool, rank: int = 0
) -> Iterator[tuple[Step, list[Batch]]]:
    """Every step from number `first` to the plan's last, with the rank's micro-batches on the host (page-locked when `pin`).

    Workers build ahead of the consumer. Raises UserError that names the record when an image has become unreadable.
    """
    loader = DataLoader(
        _MicroBatches(prepared, spec, data),
        batch_size=None,
        sampler=_jobs(plan, first, rank),  # pyright: ignore[reportArgumentType] (any iterable will do)
        num_workers=data.workers,
        prefetch_factor=4 if data.workers else None,
        pin_memory=pin,
        worker_init_fn=_in_worker,
    )
    built = iter(loader)
    for index in range(first, plan.n_steps):
        step = plan.step(index)
        batches = []
        for _ in step.micro_batches:
            batch = _take(built)
            if isinstance(batch, UserError):
                raise batch
            batches.append(batch)
        yield step, batches


def _take(built: Iterator[Batch | UserError]) -> Batch | UserError:
    """The next micro-batch. Raises RuntimeError, as PyTorch does, when the worker died while it was handing one over."""
    try:
        return next(built)
    except (ConnectionError, EOFError) as error:
        # The signal of its death, which PyTorch turns into an error that says how it died, comes within moments.
        time.sleep(_DEATH_SECONDS)
        raise RuntimeError(f"DataLoader worker exited unexpectedly ({type(error).__name__})") from None


def _jobs(plan: Steps, first: int, rank: int) -> Iterable[_Job]:
    for index in range(first, plan.n_steps):
        step = plan.step(index)
        for ranks in step.micro_batches:
            positions = ranks[rank]
            yield _Job(tuple(step.samples[positions].tolist()), tuple(step.weights[positions].tolist()))


def _in_worker(_: int) -> None:
    """Ctrl-C is the main process's to answer, and so is a first SIGTERM: torchrun and schedulers send it to the whole group."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
    torch.set_num_threads(1)
