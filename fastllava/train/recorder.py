"""The rows of metrics.jsonl: a step's is written once its numbers have arrived on the host, while the next step runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastllava.data.plan import Step
from fastllava.optim.spikes import in_words, is_spike
from fastllava.train.metrics.log import DeviceScalars, Metrics
from fastllava.train.setup import Setup
from fastllava.train.watch.standstill import Phase


class NonFinite(Exception):
    """Loss or gradient norm of a step is not finite; every process finds it alike."""

    def __init__(self, step: Step, loss: float, norm: float) -> None:
        super().__init__(f"step {step.index}: loss {loss}, gradient norm {norm}")
        self.step, self.loss, self.norm = step, loss, norm


@dataclass(frozen=True)
class Taken:
    """A step that has been launched. Its scalars may still be on their way."""

    step: Step
    scalars: DeviceScalars
    lr: float
    seconds: float
    """Since the launch of the step before."""
    waited: float
    """Seconds of these for data."""


class Recorder:
    """Takes what each step gave and writes its row later. Only the first process has `metrics`; all look for what is not finite."""

    def __init__(self, setup: Setup, metrics: Metrics | None) -> None:
        self._setup, self._metrics = setup, metrics
        self._config, self._say, self._watch = setup.context.config, setup.context.say, setup.context.watch
        self._waiting: list[Taken] = []

    def add(self, taken: Taken) -> None:
        """Keep a step's figures until `write`."""
        self._waiting.append(taken)

    def write(self, but: int = 0) -> None:
        """Write the rows of the steps that have none yet, without the last `but`; waits for their numbers.

        Raises NonFinite, and forgets the steps after it, and OSError. A step whose row failed is not tried again.
        """
        while len(self._waiting) > but:
            self._write(self._waiting.pop(0))

    def _write(self, taken: Taken) -> None:
        self._watch.now(Phase.READING)
        loss, norm, tripped, *far = taken.scalars.read()
        self._watch.now(Phase.WRITING)
        if tripped:
            self._waiting.clear()
            raise NonFinite(taken.step, loss, norm)
        if self._metrics is None:
            return
        row: dict[str, Any] = {
            "step": taken.step.index,
            "loss": loss,
            "grad_norm": norm,
            "lr": taken.lr,
            **self._setup.throughput.step(taken.step, taken.seconds, taken.waited),
        }
        if self._setup.device.type == "cuda":
            row["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self._setup.device)
        if is_spike(far):
            row["spike"] = self._spike(taken.step, loss, norm, far)
        self._metrics.write(row)

    def _spike(self, step: Step, loss: float, norm: float, far: Sequence[float]) -> dict[str, Any]:
        """Say that `step` is one; what its row says of it."""
        ids, skipped = self._setup.data.prepared.names(step.samples), self._config.train.skip_spikes
        self._say(in_words(step.index, loss, norm, far, ids, skipped))
        return {"loss_sigmas": far[0], "grad_norm_sigmas": far[1], "skipped": skipped, "samples": ids}
