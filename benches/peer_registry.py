"""The variants of `fastllava bench peers`: how each is built, with how large a micro-batch, and where it cannot run."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benches.ours import Run
from benches.peer_original import Original
from benches.peer_training import Shared, attention_for
from benches.peer_transformers import Transformers, TransformersLiger, no_liger
from fastllava.config import Stage
from fastllava.model.llava import Llava

RECIPE = {"finetune": 16, "pretrain": 32}
"""Samples of the original's micro-batch (scripts/v1_5)."""


@dataclass(frozen=True)
class Settings:
    """How much each way of training takes at once."""

    original: int
    """Samples of a micro-batch with recomputation."""
    without_recompute: int
    """Samples of one that keeps everything for backward."""
    rows: int
    """Of one of ours."""

    @property
    def dealt(self) -> int:
        """What the original's sampler deals samples to ranks by: the micro-batch, or the next smaller power of two."""
        return 2 ** (self.original.bit_length() - 1)

    @classmethod
    def of(cls, device: torch.device, stage: Stage, samples: int) -> "Settings":
        """On a GPU the recipe's, halved while memory is short; on a CPU what its memory takes for sure. At most the whole step."""
        if device.type == "cuda":
            return cls(min(RECIPE[stage], samples), min(RECIPE[stage], samples), 16384)
        return cls(min(RECIPE[stage], samples), min(4, samples), 1024)


def _anywhere(device: torch.device) -> str | None:
    return None


def _nothing(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Variant:
    """`build(run, our model, device, settings, what all share)`; of ours, which is there already, nothing."""

    summary: str
    build: Callable[[Run, Llava, torch.device, Settings, Shared], Any] = _nothing
    unsupported: Callable[[torch.device], str | None] = _anywhere


def _original(run: Run, ours: Llava, device: torch.device, settings: Settings, shared: Shared) -> Original:
    return Original(run, ours, device, settings.original, attention_for(device), shared)


def _transformers(
    run: Run, ours: Llava, device: torch.device, settings: Settings, shared: Shared, kind: type[Transformers], recompute: bool
) -> Transformers:
    micro_batch = settings.original if recompute else settings.without_recompute
    return kind(run, ours, device, micro_batch, attention_for(device), shared, recompute=recompute)


VARIANTS: Mapping[str, Variant] = {
    "original": Variant("the original's recipe as it computes", _original),
    "transformers": Variant(
        "LlavaForConditionalGeneration, padded, without recomputation", functools.partial(_transformers, kind=Transformers, recompute=False)
    ),
    "transformers_recompute": Variant(
        "the same with recomputation, and larger micro-batches", functools.partial(_transformers, kind=Transformers, recompute=True)
    ),
    "transformers_liger": Variant(
        "the same without recomputation and with Liger's patch",
        functools.partial(_transformers, kind=TransformersLiger, recompute=False),
        no_liger,
    ),
    "fastllava": Variant("ours"),
}
