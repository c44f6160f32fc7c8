"""What the benches of whole steps are asked for: sizes, stages, samples, config keys; and the runs that this makes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast, get_args

import torch

from benches.lib.fit import Extra, layers_that_fit, nothing_else
from benches.lib.ours import Run, plan_run
from benches.lib.world import check_device
from fastllava.config import Stage
from fastllava.errors import UserError
from fastllava.planner.sizes import size_named

STAGES: Sequence[Stage] = get_args(Stage)
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
    """Tokens of one of ours."""

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


@dataclass(frozen=True)
class Request:
    """Runs of the trainer that are to be measured."""

    device: torch.device
    sizes: Sequence[str]
    stages: Sequence[str]
    samples: int
    """The samples of a step."""
    seconds: float
    """The time to spend on a size and stage."""
    layers: int | None = None
    """Decoder layers; None for all of the size's."""
    overrides: Sequence[str] = ()
    """key=value words, as for `fastllava train`."""
    fit: bool = False
    """Whether to take fewer layers where memory is short."""

    @property
    def on_gpu(self) -> bool:
        """Whether the figures mean anything."""
        return self.device.type == "cuda"

    def check(self) -> None:
        """Raises UserError for what is nothing to measure."""
        check_device(self.device)
        for name in self.stages:
            if name not in STAGES:
                raise UserError(f"--stages: '{name}' is none of {', '.join(STAGES)}")
        for name in self.sizes:
            size_named(name).with_layers(None if self.fit else self.layers)

    def pairs(self) -> Iterator[tuple[str, Stage]]:
        """Every size and stage, the sizes first."""
        for size in self.sizes:
            for stage in self.stages:
                yield size, cast("Stage", stage)

    def depths(self, size: str, stage: Stage, extra: Extra = nothing_else) -> Iterator[int | None]:
        """Numbers of layers to try, each when memory was short for the one before; without `fit` only the one that was asked for."""
        if not self.fit:
            yield self.layers
            return
        most = layers_that_fit(lambda depth: self.run(size, stage, depth), size_named(size).llama.num_hidden_layers, self.device, extra)
        depth = min(most, self.layers or most)
        yield depth
        while depth > 1:
            depth = max(1, depth * 3 // 4)
            yield depth

    def run(self, size: str, stage: Stage, layers: int | None, words: Sequence[str] = ()) -> Run:
        """The run of a size and stage with so many layers; `words` come after the request's own. Raises UserError on keys that are none."""
        settings = Settings.of(self.device, stage, self.samples)
        train = {
            "precision": "bf16" if self.on_gpu else "fp32",
            "micro_batch_tokens": settings.rows,
            "reference_micro_batch": settings.dealt,
        }
        return plan_run(stage, size_named(size).with_layers(layers), train, [*self.overrides, *words], self.samples)
