"""The loop around the step: it records, saves, resumes and stops."""

import signal
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fastllava.batch import Batch, ImageSpec
from fastllava.config import Config, as_written
from fastllava.console.stopping import stop_requests
from fastllava.data.loader import BadImage, BadImages, steps
from fastllava.data.plan import Plan, Step
from fastllava.data.prepared import PreparedSet
from fastllava.disk import write_json
from fastllava.distributed.processes import Processes, attempt, peers, processes
from fastllava.distributed.sharding import UNSHARDED, Sharding, check_replicas, shard, sharding_in_words
from fastllava.errors import PeerLost, ToldElsewhere, UserError
from fastllava.model.compiled import check_compiler
from fastllava.model.execution import COMPUTE_DTYPE, Execution
from fastllava.model.llava import Llava
from fastllava.model.ops import Ops, choose_ops
from fastllava.model.weights import load_llava, read_origin
from fastllava.optim import FiniteGuard, build_optimizer, lr_factor, set_lr
from fastllava.optim.low_bit import check_low_bit
from fastllava.optim.spikes import in_words as spike_in_words
from fastllava.optim.spikes import is_spike
from fastllava.train import memory
from fastllava.train.metrics.backends import check_backends
from fastllava.train.metrics.flops import Accounting
from fastllava.train.metrics.log import DeviceScalars, Metrics
from fastllava.train.metrics.summary import LOSS_PLOT, describe_result, plot_loss, write_summary
from fastllava.train.metrics.throughput import Throughput
from fastllava.train.stages import check_start, gather_result, prepare_stage, write_result
from fastllava.train.startup import announce, check_fp8, check_fp8_widths, choose_device, kernels_in_words, open_data, set_tf32, speaker
from fastllava.train.state import checkpoint, resume, set_aside
from fastllava.train.state.checkpoint import RUN_CONFIG
from fastllava.train.state.fingerprint import fingerprint
from fastllava.train.step import train_step
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
    with processes() as group, ExitStack() as stack:
        console = (console or Console()) if group.first else Console(quiet=True)
        watch = stack.enter_context(Watchdog(config.train.watchdog_seconds, group, config.data.workers))
        say = speaker(console)
        device, ops = group.together(lambda: check_run(config, group))
        group.together(lambda: stack.enter_context(resume.locked(config.output_dir) if group.first else nullcontext()))
        spec, prepared = open_data(config, say, group, watch.board)
        accounting = group.together(lambda: Accounting.of(config))
        plan = group.together(lambda: Plan(prepared, config.data, config.train, accounting.cost(), group.world))
        with memory.while_setting_up(config, group.world):
            model = group.together(lambda: load_llava(config.model, Execution.of(config, ops), config.train.seed))
        start = fingerprint(model, group)
        held = group.on_first(lambda: resume.look(config, prepared.digest, start, say))
        if held.summary is not None:
            say(f"{config.output_dir} holds this run, complete: nothing to do")
            return RunResult(config.output_dir, None, dict(held.summary))
        aside, first = (found.set_aside, found.step) if (found := held.checkpoint) is not None else ({}, 0)
        plan.leave_out(group.on_first(lambda: set_aside.begin(config, prepared, aside, first)))
        if plan.left_out:
            say(f"{len(plan.left_out):,} samples are left out, listed in {config.output_dir / set_aside.SET_ASIDE}")
        sharding = Sharding(group, config.parallel)
        with memory.while_setting_up(config, group.world):
            with group.alike():
                trained = prepare_stage(model, config, place=lambda model: shard(model, sharding, device))
                model.to(device)
            optimizer = build_optimizer(trained.items(), config.optim, config.train.seed)
            announce(config, model, trained, prepared, plan, device, say)
            say(f"compile: {config.train.compile}; tf32: {'on' if config.train.tf32 else 'off'}; kernels: {kernels_in_words(model)}")
            if group.world > 1:
                say(sharding_in_words(model, sharding))
            if (found := held.checkpoint) is not None:
                with group.alike():
                    checkpoint.restore(found, trained, optimizer, group)
                say(f"resuming before step {found.step} from {found.folder}")
        group.on_first(lambda: write_json(config.output_dir / RUN_CONFIG, as_written(config)))
        throughput = Throughput.of(plan, accounting, device)
        state = config, model, trained, optimizer, throughput
        return Trainer(*state, prepared, spec, device, held, began, console, watch, sharding).train()


def check_run(config: Config, group: Processes) -> tuple[torch.device, Ops]:
    """The device and the kernels, once all is there that can be looked for before data and weights are read."""
    device, mode = choose_device(config, group.local_rank), config.train.compile
    dtype, origin = COMPUTE_DTYPE[config.train.precision], read_origin(config.model)
    ops = choose_ops(config.kernels, device, dtype, compiled=mode != "off", sizes=origin.sizes)
    set_tf32(config)
    check_compiler(mode, device)
    check_backends(config.log)
    check_replicas(config.parallel, group.world)
    check_low_bit(config.optim, group.world)
    check_fp8(config, device, group.world)
    check_fp8_widths(config, origin.llama)
    check_start(config)
    return device, ops


class Trainer:
    """The loop of one stage. `next_step` is the number of the step that the state in memory comes before."""

    def __init__(
        self,
        config: Config,
        model: Llava,
        trained: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        throughput: Throughput,
        prepared: PreparedSet,
        spec: ImageSpec,
        device: torch.device,
        held: resume.Held,
        began: float,
        console: Console,
        watch: Watchdog,
        sharding: Sharding = UNSHARDED,
    ) -> None:
        self.config, self.model, self.trained, self.optimizer = config, model, trained, optimizer
        self.throughput, self.plan = throughput, throughput.plan
        self.prepared, self.spec, self.device = prepared, spec, device
        self.console, self.say = console, speaker(console)
        self.sharding, self.group = sharding, sharding.processes
        self.held = held
        self.first_step = self.next_step = held.checkpoint.step if held.checkpoint else 0
        self._began = began
        self._saved_step = self.first_step
        self._guard = FiniteGuard(optimizer, device, config.train.skip_spikes)
        self._saved_at = time.monotonic()
        self._pending: Callable[[], None] = _nothing
        self._in_step = False
        self._watch = watch
        watch.goes_on, watch.sample_in_words = self._goes_on, self._sample_in_words

    def train(self) -> RunResult:
        """Run every step that is left and write the result."""
        try:
            with stop_requests() as stopped, ExitStack() as stack:
                metrics = self.group.together(lambda: stack.enter_context(self._metrics()))
                stop = self._steps(metrics, stopped)
            self._watch.now(Phase.WRITING)
        except PeerLost:
            raise
        except (UserError, OSError) as error:
            # Something the user can mend broke on the way: what was trained so far is kept.
            self.optimizer.zero_grad(set_to_none=True)
            # A checkpoint takes all processes, and the others do not know of what befell this one within a step.
            if self.group.world == 1 or not self._in_step:
                self._save()
            raise self._in_words(error) from None
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

    def _stopped(self, stop: signal.Signals) -> RunResult:
        out, again = self.config.output_dir, "the same command goes on from there"
        if not self._save():
            error = UserError(f"output_dir: {out} took no checkpoint when the run was stopped at step {self.next_step}; make room there")
            raise self.group.voiced(error)
        self.say(f"stopped by {stop.name} before step {self.next_step} of {self.plan.n_steps}; {again}")
        summary = self.group.on_first(lambda: self._summarize("interrupted"))
        self.group.on_first(self._plot)
        return RunResult(out, stop, summary)

    def _completed(self) -> RunResult:
        out = self.config.output_dir
        # First of all: to gather and to write the result may fail, and what was trained would be lost with this process.
        self._save()
        with peers(), memory.while_writing(self.config):
            state = gather_result(self.model, self.config, self.group.first) if self.group.world > 1 else None
        try:
            left = self.group.on_first(lambda: write_result(self.model, self.config, state, self.say))
            summary = self.group.on_first(lambda: self._summarize("complete", result=describe_result(out, left)))
        except OSError as error:
            mend = f"output_dir: {out} did not take the result ({error}); make room and start the same command again; {self._goes_on()}"
            raise self.group.voiced(UserError(mend)) from None
        if self.config.train.checkpoint_steps is self.config.train.checkpoint_minutes is None:
            # Not wanted, and the result is whole.
            self.group.on_first(lambda: checkpoint.remove(out / f"checkpoint-{self.next_step}"))
        without = f", without {summary['set_aside']:,} samples set aside" if summary["set_aside"] else ""
        self.say(f"complete: {_figures_in_words(summary)}{without}")
        for path in left if self.config.stage == "pretrain" else [out]:
            self.say(f"left {path}")
        self.group.on_first(self._plot)
        return RunResult(out, None, summary)

    def _plot(self) -> None:
        """The last thing of all, as the least: what a plotting library raises is said."""
        try:
            plot_loss(self.config.output_dir, f"{self.config.stage}: {self.config.output_dir}")
        except Exception as error:
            self.say(f"{LOSS_PLOT} could not be drawn ({type(error).__name__}: {' '.join(str(error).split())}); all else is there")

    def _metrics(self) -> AbstractContextManager[Metrics | None]:
        return Metrics(self.config, self.next_step, self.plan.n_steps, self.console) if self.group.first else nullcontext()

    def _steps(self, metrics: Metrics | None, stopped: Sequence[signal.Signals]) -> signal.Signals | None:
        """Run the steps that are left; the signal that ended them early on any process, or None.

        Whatever only one process may meet (a picture, a disk, a signal, the clock) is held until all agree what to do about
        it, before a step: within one, a process that left would leave the others waiting.
        """
        with ExitStack() as streams:
            try:
                stop = self._run(metrics, streams, stopped)
            except PeerLost:
                raise
            except Exception:
                self._watch.now(Phase.WRITING)
                # Of the steps before. Should that fail too, it was the first error that the others heard of.
                attempt(self._record_pending)
                raise
        return stop

    def _stream(self) -> Generator[tuple[Step, list[Batch]], None, None]:
        options = {
            "pin": self.device.type == "cuda",
            "rank": self.group.rank,
            "board": self._watch.board,
            "report": self.say if self.group.first else speaker(Console(stderr=True)),
        }
        return steps(self.plan, self.next_step, self.prepared, self.spec, self.config.data, **options)

    def _run(self, metrics: Metrics | None, streams: ExitStack, stopped: Sequence[signal.Signals]) -> signal.Signals | None:
        stream = streams.enter_context(closing(self._stream()))
        began, failed = time.perf_counter(), None
        while self.next_step < self.plan.n_steps:
            fetching = time.perf_counter()
            self._watch.now(Phase.FETCHING)
            fetched, failed = attempt(lambda stream=stream: next(stream)) if failed is None else (None, failed)
            waited = time.perf_counter() - fetching
            self._watch.now(Phase.AGREEING)
            bad, failed = (failed.found, None) if isinstance(failed, BadImages) else ((), failed)
            asked = int(stopped[0]) if stopped else 0
            stop, save, worse = self.group.agree(failed, asked, int(self._save_due()), int(bool(bad)))
            if stop:
                self.group.together(self._record_pending)
                return signal.Signals(stop)
            if save:
                saving = time.perf_counter()
                self.group.together(self._record_pending)
                self._save()
                began += time.perf_counter() - saving
            if worse:
                self._set_aside(bad)
                streams.close()
                stream = streams.enter_context(closing(self._stream()))
                continue
            began, failed = self._step(metrics, *fetched, began, waited)
        self._watch.now(Phase.AGREEING)
        self.group.agree(failed)
        self.group.together(self._record_pending)
        return None

    def _set_aside(self, mine: Sequence[BadImage]) -> None:
        """Leave out, from the next step on, the samples of it that any process could not read. Raises UserError when that may not be."""
        images, step = self.config.data.images, self.next_step
        positions = [i for ranks in self.plan.step(step).micro_batches for i in ranks[self.group.rank].tolist()]
        read = int(self.plan.lengths.n_images[self.plan.step(step).samples[positions]].sum())

        def judged() -> Sequence[BadImage]:
            wrong = set_aside.nothing_is_there(images, mine, read) if mine and images is not None else None
            if wrong is not None:
                raise UserError(f"{wrong} and start the same command again")
            return mine

        bad = sorted((one for found in self.group.gather(judged) for one in found), key=lambda one: one.sample)
        held = len(self.plan.left_out)
        self.group.on_first(lambda: set_aside.add(self.config, self.prepared, bad, held, step))
        self.plan.leave_out({one.sample: step for one in bad})
        for one in bad:
            self.say(f"left out from step {step} on, and listed in {self.config.output_dir / set_aside.SET_ASIDE}: {one.in_words()}")

    def _step(
        self, metrics: Metrics | None, step: Step, batches: list[Batch], began: float, waited: float
    ) -> tuple[float, Exception | None]:
        """Run `step`; when it had been launched, and what went wrong with recording the one before."""
        self._in_step = True
        factor = lr_factor(step.index, self.plan.n_steps, self.config.optim)
        set_lr(self.optimizer, factor)
        self._watch.now(Phase.STEPPING)
        with peers(), memory.within_a_step(self.config, self.group.world, int(self.plan.lengths.n_tokens.max())):
            scalars = train_step(
                self.model, self.optimizer, self._guard, batches, self.device, self.config.optim.max_grad_norm, self.sharding
            )
        # The optimizer has moved: first of all count that, so that whatever fails below saves the state under its number.
        self.next_step = step.index + 1
        self._guard.moving = False
        before, ended = self._pending, time.perf_counter()
        self._pending = self._recorder(metrics, step, scalars, factor, waited, ended - began)
        self._in_step = False
        # The row of the step before: its numbers have arrived while this step was being launched. To wait for them is part of
        # the time between two launches, so of the next step's.
        return ended, attempt(before)[1]

    def _record_pending(self) -> None:
        pending, self._pending = self._pending, _nothing
        pending()

    def _recorder(
        self, metrics: Metrics | None, step: Step, scalars: DeviceScalars, factor: float, waited: float, seconds: float
    ) -> Callable[[], None]:
        """Writes the step's row when called, once its numbers are on the host."""

        def record() -> None:
            self._watch.now(Phase.READING)
            loss, norm, tripped, *far = scalars.read()
            self._watch.now(Phase.WRITING)
            if tripped:
                self._fail_on_non_finite(step, loss, norm)
            if metrics is None:
                return
            row: dict[str, Any] = {
                "step": step.index,
                "loss": loss,
                "grad_norm": norm,
                "lr": self.config.optim.lr * factor,
                **self.throughput.step(step, seconds, waited),
            }
            if self.device.type == "cuda":
                row["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
            if is_spike(far):
                row["spike"] = self._spike(step, loss, norm, far)
            metrics.write(row)

        return record

    def _spike(self, step: Step, loss: float, norm: float, far: Sequence[float]) -> dict[str, Any]:
        """Say that `step` is one; what its row says of it."""
        ids, skipped = self._ids(step), self.config.train.skip_spikes
        self.say(spike_in_words(step.index, loss, norm, far, ids, skipped))
        return {"loss_sigmas": far[0], "grad_norm_sigmas": far[1], "skipped": skipped, "samples": ids}

    def _ids(self, step: Step) -> list[str]:
        return [self.prepared.row(int(i)).id for i in step.samples]

    def _fail_on_non_finite(self, step: Step, loss: float, norm: float) -> None:
        """The guard has kept the optimizer still since before `step`, so the state in memory is the one before it."""
        self.next_step = step.index
        self._pending = _nothing
        ids = self._ids(step)
        path = self.config.output_dir / f"non_finite_step_{step.index}.json"
        if self.group.first:
            write_json(path, {"step": step.index, "loss": str(loss), "grad_norm": str(norm), "samples": ids})
        kept = f"checkpoint-{step.index} holds the state before it" if step.index else "it stands where it began"
        error = UserError(
            f"step {step.index}: loss {loss}, gradient norm {norm}; the optimizer did not move, {kept}; "
            f"look at the step's samples in {path} ({', '.join(ids[:4])}, ...), or lower optim.lr in a new output_dir"
        )
        raise self.group.voiced(error)

    def _in_words(self, error: UserError | OSError) -> UserError:
        if isinstance(error, OSError):
            words = f"output_dir: {self.config.output_dir} could not be written ({error}); make room and start the same command again"
            error = UserError(words) if self._in_step else self.group.voiced(UserError(words))
        elif self.group.first:
            self._summarize("failed")
        alone = self._in_step and self.group.world > 1 and not isinstance(error, ToldElsewhere)
        return UserError(f"{error}; {self._kept()}") if alone else error

    def _save_due(self) -> bool:
        train = self.config.train
        by_step = train.checkpoint_steps is not None and self.next_step % train.checkpoint_steps == 0
        by_time = train.checkpoint_minutes is not None and time.monotonic() - self._saved_at >= 60 * train.checkpoint_minutes
        return (by_step or by_time) and self.next_step < self.plan.n_steps

    def _save(self) -> bool:
        """Write a checkpoint; a disk that fails is reported and never stops the training. False when there is none of this state.

        Before the first step there is nothing to keep, and what an optimizer has begun to move is no state at all.
        """
        if self._guard.moving:
            self.say(f"the optimizer was stopped within step {self.next_step}: that is no state to keep; {self._goes_on()}")
            return False
        if self.next_step == self._saved_step:
            return True
        self._saved_at = time.monotonic()
        self._watch.now(Phase.WRITING)
        out = self.config.output_dir
        with memory.while_writing(self.config):
            try:
                state, held = (self.prepared.digest, self.trained, self.optimizer, self.group), self.held
                left_out = self.plan.left_out
                folder = checkpoint.save(out, self.next_step, self.config, *state, run=held.run, start=held.start, set_aside=left_out)
                damaged = held.checkpoint.passed_over if held.checkpoint else ()
                self.group.on_first(lambda: checkpoint.keep_last(out, self.config.train.keep_checkpoints, folder, damaged))
            except OSError as error:
                why = f"could not be written ({error}); older ones are untouched, training goes on"
                self.say(f"checkpoint before step {self.next_step} {why}")
                return False
        self._saved_step = self.next_step
        self.say(f"wrote {folder}")
        return True

    def _kept(self) -> str:
        """What is left after an error within a step of several processes, which cannot save together then."""
        return f"step {self.next_step} was not completed, and nothing is saved within a step of several processes: {self._goes_on()}"

    def _goes_on(self) -> str:
        """Where the same command begins, as far as checkpoints have been written."""
        return f"the same command goes on from checkpoint-{self._saved_step}" if self._saved_step else "the same command begins at step 0"

    def _sample_in_words(self, sample: int) -> str:
        row = self.prepared.row(sample)
        images = self.config.data.images
        return f"record {row.id}" if row.image is None or images is None else f"record {row.id} ({images / row.image})"

    def _summarize(self, status: str, **more: Any) -> dict[str, Any]:
        facts = {
            "config": as_written(self.config),
            "run": self.held.run,
            "start": self.held.start,
            "prepared_digest": self.prepared.digest,
            "prepared": str(self.prepared.folder),
            "records": self.plan.n_samples,
            "quarantined": self.prepared.manifest["quarantined"],
            "set_aside": len(self.plan.left_out),
            "kernels": self.model.kernels(),
            "planned_steps": self.plan.n_steps,
            "processes": self.group.world,
            "notes": list(self.held.notes),
            **more,
        }
        counts, seconds = self.throughput.counts(self.next_step), time.monotonic() - self._began
        return write_summary(self.config.output_dir, status, facts, self.next_step, counts, self.first_step, seconds)


def _figures_in_words(summary: dict[str, Any]) -> str:
    """Loss and rates of a finished run, as far as its metrics tell."""
    if summary["closing_loss"] is None or not summary["samples_per_second"]:
        return f"{summary['samples']:,} samples; rows of metrics.jsonl are missing, so loss and rates are not told"
    return (
        f"loss {summary['closing_loss']:.4f} (mean of the last {summary['closing_steps']} steps), "
        f"{summary['samples']:,} samples in {summary['step_seconds']:.0f} s, "
        f"{summary['samples_per_second']:.1f} samples/s, {summary['tokens_per_second']:,.0f} tokens/s, goodput {summary['goodput']:.0%}"
    )


def _nothing() -> None:
    pass
