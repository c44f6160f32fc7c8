"""Evaluation while a run trains: when it is due, and a row of metrics.jsonl for each.

It draws nothing from the training's random numbers, moves no weight, and its time is no step's: the training's numbers are bit for bit
those without it. An evaluation of step k is of the state before step k, so that of step 0 is of the model that the run begins with.
"""

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from rich.console import Console

from fastllava.console.speaker import speaker
from fastllava.train import memory
from fastllava.train.held_out import HeldOutEvaluation
from fastllava.train.metrics.log import Metrics
from fastllava.train.samples import SampleAnswers
from fastllava.train.setup import Setup
from fastllava.train.watch.standstill import Phase


class Stopped(Exception):
    """A process was asked to stop; all hear of it at the same place."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


class Evaluation:
    """Evaluates the model of a run. All processes make one and call it together; only the first has `metrics`."""

    def __init__(
        self,
        setup: Setup,
        metrics: Metrics | None,
        stopped: Sequence[signal.Signals],
        computing: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """`computing`: a block in which the processes compute together, so that none may leave it alone."""
        context, data = setup.context, setup.data
        self._setup, self._metrics, self._stopped, self._computing = setup, metrics, stopped, computing
        self._config, self._group, self._watch = context.config, context.group, context.watch
        report = context.say if self._group.first else speaker(Console(stderr=True))
        self._held = self._answers = None
        self._longest = 0 if data.held_out is None else int(data.held_out.prepared.n_tokens[data.held_out.samples].max())
        if data.held_out is not None:
            place = setup.device, self._group, context.say, report
            self._held = HeldOutEvaluation(data.held_out, self._config, data.spec, data.accounting.cost(), *place)
        if data.asked:
            self._answers = SampleAnswers(data.asked, self._config, data.tokenizer, data.spec, self._group, report)
        first = setup.first_step
        self._done = first if self._group.on_first(lambda: metrics is not None and metrics.evaluated) else -1

    def due(self, step: int) -> bool:
        """Whether the state before `step` is to be evaluated, and has not been."""
        if step == self._done or (self._held is None and self._answers is None):
            return False
        every = self._config.eval.every_steps
        return step == self._setup.data.plan.n_steps or (every is not None and step % every == 0)

    def run(self, step: int) -> signal.Signals | None:
        """Evaluate the state before `step` and write its row; the signal that stopped it, if one did, and then there is no row.

        Raises UserError for what the user can mend.
        """
        model, device = self._setup.model, self._setup.device
        began = time.perf_counter()
        row: dict[str, Any] = {"step": step}
        model.eval()
        try:
            # The loader draws a seed for its workers.
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                if self._held is not None:
                    with self._watch.reads(self._held.board, self._sample_in_words):
                        found = self._held.loss(model, self._setup.sharding, self)
                    row |= {"held_out_loss": found.loss, "held_out_samples": found.samples, "held_out_tokens": found.tokens}
                    row["held_out_set"] = self._held.held.name
                if self._answers is not None:
                    row["samples"] = self._answers.rows(model, self)
        except Stopped as request:
            return request.signal
        finally:
            model.train()
            self._setup.sharding.end_evaluation(model)
        if device.type == "cuda":
            # Its blocks are of other sizes than the training's.
            torch.cuda.empty_cache()
        self._done = step
        row["eval_seconds"] = time.perf_counter() - began
        self._watch.now(Phase.WRITING)
        with self._group.together():
            if self._metrics is not None:
                self._metrics.write_evaluation(row)
        return None

    def fetching(self) -> None:
        """As `held_out.Lockstep` has it."""
        self._watch.now(Phase.FETCHING)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """As `held_out.Lockstep` has it."""
        self._watch.now(Phase.EVALUATING)
        with self._computing(), memory.while_evaluating(self._config, self._longest):
            yield

    def agree(self, failed: Exception | None = None, mine: bool = False) -> bool:
        """As `held_out.Lockstep` has it."""
        self._watch.now(Phase.AGREEING)
        stop, any_ = self._group.vote(failed, int(self._stopped[0]) if self._stopped else 0, mine)
        if stop:
            raise Stopped(stop)
        self._watch.now(Phase.EVALUATING)
        return bool(any_)

    def _sample_in_words(self, sample: int) -> str:
        assert self._held is not None  # noqa: S101 (nothing else is read here)
        return f"held-out record {self._held.held.prepared.row(sample).id}"


def is_whole(row: Mapping[str, Any], setup: Setup) -> bool:
    """Whether the row of an evaluation has all that one of this run gives."""
    held, asked = setup.data.held_out, setup.data.asked
    return (held is None or row.get("held_out_set") == held.name) and (not asked or len(row.get("samples", ())) == len(asked))
