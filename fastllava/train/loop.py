"""The loop around the step: it records, saves, resumes and stops."""

import signal
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console

from fastllava.batch import Batch
from fastllava.config import Config
from fastllava.console.speaker import speaker
from fastllava.console.stopping import stop_requests
from fastllava.data.loader import BadImage, BadImages, steps
from fastllava.data.plan import Step
from fastllava.disk import write_json
from fastllava.distributed.processes import collective, processes
from fastllava.errors import PeerLost, ToldElsewhere, UserError
from fastllava.optim import FiniteGuard, lr_factor, set_lr
from fastllava.train import memory
from fastllava.train.evaluation import Evaluation, is_whole
from fastllava.train.machine import check_run
from fastllava.train.metrics.log import Metrics
from fastllava.train.recorder import NonFinite, Recorder, Taken
from fastllava.train.result import leave_result, plot, summarize
from fastllava.train.saver import Saver
from fastllava.train.setup import Context, Setup, find_data, find_start, make_ready, output_locked
from fastllava.train.state import set_aside
from fastllava.train.step import train_step
from fastllava.train.template import with_template
from fastllava.train.watch.standstill import Phase
from fastllava.train.watch.watchdog import Watchdog


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    output_dir: Path
    stopped_by: signal.Signals | None
    """The signal that asked it to stop, or None when it is complete."""
    summary: dict[str, Any]


def run(config: Config, console: Console | None = None) -> RunResult:
    """Train one stage from `config`: prepare the data when needed, resume when output_dir holds the run, leave the result there.

    Raises UserError for whatever the user can mend. After SIGINT or SIGTERM the step is finished and a checkpoint written.
    """
    began = time.monotonic()
    with (
        processes(config.parallel.gather == "copy_engine") as group,
        Watchdog(config.train.watchdog_seconds, group, config.data.workers) as watch,
    ):
        console = (console or Console()) if group.first else Console(quiet=True)
        context = Context(config, group, console, watch, began)
        with group.together():
            config = with_template(config, context.say)
            context = replace(context, config=config)
            device, ops = check_run(config, group)
        with output_locked(context):
            data = find_data(context)
            start = find_start(context, data, ops)
            if start.held.summary is not None:
                context.say(f"{config.output_dir} holds this run, complete: nothing to do")
                return RunResult(config.output_dir, None, dict(start.held.summary))
            return Trainer(make_ready(context, data, start, device)).train()


class Trainer:
    """The loop of one stage. `next_step` is the number of the step that the state in memory comes before."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.context = setup, setup.context
        self.config, self.group, self.say = setup.context.config, setup.context.group, setup.context.say
        self.plan, self.prepared = setup.data.plan, setup.data.prepared
        self.next_step = setup.first_step
        self._saver = Saver(setup)
        self._guard = FiniteGuard(setup.optimizer, setup.device, self.config.train.skip_spikes)
        self._recorder = Recorder(setup, None)
        self._in_step = False
        self._failed: Exception | None = None
        """What befell this process alone between two steps: raised at the next vote, by all."""
        self._launched = 0.0
        """When the last step was, by `time.perf_counter`, the time of checkpoints and evaluations since then left out."""
        self._watch = setup.context.watch
        self._watch.goes_on, self._watch.sample_in_words = self._saver.goes_on, self._sample_in_words

    def train(self) -> RunResult:
        """Run every step that is left and write the result."""
        try:
            with stop_requests() as stopped, ExitStack() as stack:
                with self.group.together():
                    metrics = self._metrics() if self.group.first else None
                    if metrics is not None:
                        stack.enter_context(metrics)
                self._recorder = Recorder(self.setup, metrics)
                stop = self._steps(stopped, Evaluation(self.setup, metrics, stopped, self._evaluating))
            self._watch.now(Phase.WRITING)
        except PeerLost:
            raise
        except (UserError, OSError) as error:
            # Something the user can mend broke on the way: what was trained so far is kept.
            self.setup.optimizer.zero_grad(set_to_none=True)
            # A checkpoint takes all processes, and the others do not know of what befell this one within a step.
            if self.group.world == 1 or not self._in_step:
                self._save()
            self._fail(error)
        except Exception as error:
            # Between steps the others raise at the same place, so that all can keep what was trained.
            if not self._in_step:
                self._save()
            elif self.group.world > 1:
                error.add_note(self._kept())
            raise
        if stop is not None:
            return self._stopped(stop)
        return self._completed()

    def _metrics(self) -> Metrics:
        whole = partial(is_whole, setup=self.setup)
        return Metrics(self.config, self.next_step, self.plan.n_steps, self.context.console, whole)

    def _stopped(self, stop: signal.Signals) -> RunResult:
        out, again = self.config.output_dir, "the same command goes on from there"
        if not self._save():
            with self.group.first_speaks():
                raise UserError(f"output_dir: {out} took no checkpoint when the run was stopped at step {self.next_step}; free space there")
        self.say(f"stopped by {stop.name} before step {self.next_step} of {self.plan.n_steps}; {again}")
        summary = self.group.on_first(lambda: summarize(self.setup, "interrupted", self.next_step))
        plot(self.setup)
        return RunResult(out, stop, summary)

    def _completed(self) -> RunResult:
        # First of all: to gather and to write the result may fail, and what was trained would be lost with this process.
        self._save()
        summary = leave_result(self.setup, self.next_step, self._saver.goes_on())
        return RunResult(self.config.output_dir, None, summary)

    def _steps(self, stopped: Sequence[signal.Signals], evaluation: Evaluation) -> signal.Signals | None:
        """Run the steps that are left; the signal that ended them early on any process, or None.

        Whatever only one process may meet (a picture, a disk, a signal, the clock) is held until all vote what to do about
        it, before a step: within one, a process that left would leave the others waiting.
        """
        with ExitStack() as streams:
            try:
                return self._run(streams, stopped, evaluation)
            except PeerLost:
                raise
            except Exception:
                self._watch.now(Phase.WRITING)
                # The rows of the steps before. Should that fail too, it was the first error that the others heard of.
                with suppress(Exception):
                    self._record()
                raise

    def _stream(self) -> Generator[tuple[Step, list[Batch]], None, None]:
        options = {
            "pin": self.setup.device.type == "cuda",
            "rank": self.group.rank,
            "seed": self.config.train.seed if self.config.lora.draws else None,
            "board": self._watch.board,
            "report": self.say if self.group.first else speaker(Console(stderr=True)),
        }
        return steps(self.plan, self.next_step, self.prepared, self.setup.data.spec, self.config.data, **options)

    def _run(self, streams: ExitStack, stopped: Sequence[signal.Signals], evaluation: Evaluation) -> signal.Signals | None:
        stream = streams.enter_context(closing(self._stream()))
        self._launched = time.perf_counter()
        while self.next_step < self.plan.n_steps:
            fetching, fetched, bad = time.perf_counter(), None, ()
            self._watch.now(Phase.FETCHING)
            if self._failed is None:
                try:
                    fetched = next(stream)
                except BadImages as error:
                    bad = error.found
                except Exception as error:
                    self._failed = error
            waited = time.perf_counter() - fetching
            self._watch.now(Phase.AGREEING)
            stop, save, worse = self.group.vote(self._failed, int(stopped[0]) if stopped else 0, self._saver.due(self.next_step), bool(bad))
            if stop:
                self._record_together()
                return signal.Signals(stop)
            if save:
                saving = time.perf_counter()
                self._record_together()
                self._save()
                self._launched += time.perf_counter() - saving
            if evaluation.due(self.next_step) and (asked := self._evaluate(evaluation)) is not None:
                return asked
            if worse:
                self._set_aside(bad)
                streams.close()
                stream = streams.enter_context(closing(self._stream()))
            elif fetched is not None:
                self._step(*fetched, waited)
        self._watch.now(Phase.AGREEING)
        self.group.vote(self._failed)
        self._record_together()
        if not evaluation.due(self.next_step):
            return None
        self._save()
        return self._evaluate(evaluation)

    def _evaluate(self, evaluation: Evaluation) -> signal.Signals | None:
        """Evaluate the state in memory, in time that is no step's; the signal that stopped this early on any process, or None."""
        self._record_together()
        if self.setup.device.type == "cuda":
            torch.cuda.synchronize(self.setup.device)
        began = time.perf_counter()
        stop = evaluation.run(self.next_step)
        self._in_step = False
        self._launched += time.perf_counter() - began
        return stop

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """A block in which the processes compute together: one that fails in it leaves the others waiting, as in a step."""
        self._in_step = self.group.world > 1
        with collective():
            yield
        self._in_step = False

    def _set_aside(self, mine: Sequence[BadImage]) -> None:
        """Leave out, from the next step on, the samples of it that any process could not read. Raises UserError when that may not be."""
        step = self.next_step
        positions = [i for ranks in self.plan.step(step).micro_batches for i in ranks[self.group.rank].tolist()]
        read = int((self.plan.lengths.n_images[self.plan.step(step).samples[positions]] > 0).sum())
        bad = set_aside.found_by_any(self.group, self.config.data.images, mine, read)
        with self.group.together():
            if self.group.first:
                set_aside.add(self.config, self.prepared, bad, len(self.plan.left_out), step)
        self.plan.leave_out({one.sample: step for one in bad})
        for one in bad:
            self.say(f"left out from step {step} on, and listed in {self.config.output_dir / set_aside.SET_ASIDE}: {one.in_words()}")

    def _step(self, step: Step, batches: list[Batch], waited: float) -> None:
        """Run `step`, for whose batches this process `waited` so many seconds, and write the row of the one before."""
        setup, optim = self.setup, self.config.optim
        self._in_step = True
        factor = lr_factor(step.index, self.plan.n_steps, optim)
        set_lr(setup.optimizer, factor)
        self._watch.now(Phase.STEPPING)
        with collective(), memory.within_a_step(self.config, self.group.world, int(self.plan.lengths.n_tokens.max())):
            scalars = train_step(setup.model, setup.optimizer, self._guard, batches, setup.device, optim.max_grad_norm, setup.sharding)
        # The optimizer has moved: first of all count that, so that whatever fails below saves the state under its number.
        self.next_step = step.index + 1
        self._guard.moving = False
        before, self._launched = self._launched, time.perf_counter()
        self._recorder.add(Taken(step, scalars, optim.lr * factor, self._launched - before, waited))
        self._in_step = False
        # The row of the step before: its numbers have arrived while this step was being launched. To wait for them is part of
        # the time between two launches, so of the next step's.
        try:
            self._record(but=1)
        except Exception as error:
            self._failed = error

    def _record_together(self) -> None:
        with self.group.together():
            self._record()

    def _record(self, but: int = 0) -> None:
        """Write the rows that are left, without the last `but`. Raises UserError when a step was not finite."""
        try:
            self._recorder.write(but)
        except NonFinite as found:
            self._fail_on_non_finite(found)

    def _fail_on_non_finite(self, found: NonFinite) -> NoReturn:
        """The guard has kept the optimizer still since before that step, so the state in memory is the one before it."""
        self.next_step = step = found.step.index
        ids = self.prepared.names(found.step.samples)
        path = self.config.output_dir / f"non_finite_step_{step}.json"
        if self.group.first:
            write_json(path, {"step": step, "loss": str(found.loss), "grad_norm": str(found.norm), "samples": ids})
        kept = f"checkpoint-{step} holds the state before it" if step else "it stands where it began"
        with self.group.first_speaks():
            raise UserError(
                f"{found}; the optimizer did not move, {kept}; "
                f"look at the step's samples in {path} ({', '.join(ids[:4])}, ...), or lower optim.lr in a new output_dir"
            ) from None

    def _fail(self, error: UserError | OSError) -> NoReturn:
        """Raise `error` as a UserError that says what is left."""
        if isinstance(error, OSError):
            words = f"output_dir: {self.config.output_dir} could not be written ({error}); free space and start the same command again"
            if not self._in_step:
                with self.group.first_speaks():
                    raise UserError(words) from None
            error = UserError(words)
        elif self.group.first:
            summarize(self.setup, "failed", self.next_step)
        if self._in_step and self.group.world > 1 and not isinstance(error, ToldElsewhere):
            raise UserError(f"{error}; {self._kept()}") from None
        raise error from None

    def _kept(self) -> str:
        """What is left after an error within a step of several processes, which cannot save together then."""
        goes_on = self._saver.goes_on()
        return f"step {self.next_step} was not completed, and nothing is saved within a step of several processes: {goes_on}"

    def _save(self) -> bool:
        """Write a checkpoint of the state in memory. False when there is none, as what an optimizer has begun to move is no state."""
        if self._guard.moving:
            self.say(f"the optimizer was stopped within step {self.next_step}: that is no state to keep; {self._saver.goes_on()}")
            return False
        return self._saver.save(self.next_step)

    def _sample_in_words(self, sample: int) -> str:
        row = self.prepared.row(sample)
        images = self.config.data.images
        shown = ", ".join(str(images / image) for image in row.images) if images is not None else ""
        return f"record {row.id} ({shown})" if shown else f"record {row.id}"
