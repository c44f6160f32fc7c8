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
            size_named(name, "--sizes").with_layers(None if self.fit else self.layers)

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
        most = layers_that_fit(lambda depth: self.run(size, stage, depth), size_named(size).llm.num_hidden_layers, self.device, extra)
        depth = min(most, self.layers or most)
        yield depth
        while depth > 1:
            depth = max(1, depth * 3 // 4)
            yield depth

    def micro_batch(self, stage: Stage, recomputes: bool) -> int:
        """Samples of others' micro-batch: the recipe's, the whole step at most; without recomputation what a CPU takes for sure."""
        return min(RECIPE[stage], self.samples) if recomputes or self.on_gpu else min(4, self.samples)

    def run(self, size: str, stage: Stage, layers: int | None, words: Sequence[str] = ()) -> Run:
        """The run of a size and stage with so many layers; `words` come after the request's own. Raises UserError on keys that are none."""
        train = {
            "precision": "bf16" if self.on_gpu else "fp32",
            "micro_batch_tokens": 16384 if self.on_gpu else 1024,
            # What the original's sampler deals samples to ranks by: its micro-batch, or the next smaller power of two.
            "reference_micro_batch": 2 ** (self.micro_batch(stage, recomputes=True).bit_length() - 1),
        }
        return plan_run(stage, size_named(size).with_layers(layers), train, [*self.overrides, *words], self.samples)
