"""The training of one stage: the step, and the loop around it that records, saves, resumes and stops."""

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fastllava import checkpoint, resume
from fastllava.accounting import Accounting
from fastllava.batch import Batch, ImageSpec
from fastllava.checkpoint import RUN_CONFIG, write_json
from fastllava.config import Config
from fastllava.data.loader import steps
from fastllava.data.plan import Plan, Step
from fastllava.data.prepared import PreparedSet
from fastllava.errors import UserError
from fastllava.metrics import DeviceScalars, Metrics, check_backends
from fastllava.model.compiled import check_compiler, compile_model
from fastllava.model.llava import Llava
from fastllava.model.ops import choose_ops
from fastllava.model.weights import load_llava
from fastllava.optim import FiniteGuard, build_optimizer, clip_gradients, gradient_norm, lr_factor, parameters, set_lr
from fastllava.stages import COMPUTE_DTYPE, check_start, prepare_stage, write_result
from fastllava.startup import announce, choose_device, kernels_in_words, prepare_data, set_tf32, speaker
from fastllava.stopping import stop_requests
from fastllava.summary import plot_loss, write_summary
from fastllava.throughput import Throughput


def train_step(
    model: Llava,
    optimizer: torch.optim.Optimizer,
    guard: FiniteGuard,
    batches: Sequence[Batch],
    device: torch.device,
    max_norm: float | None,
) -> DeviceScalars:
    """One optimizer step over its micro-batches: fp32 loss, gradient norm before clipping, and whether the guard has tripped.

    The batches' weights already hold the step's normalisation, so losses and gradients only add up. Nothing here waits
    for the device.
    """
    loss = torch.zeros((), device=device)
    for batch in batches:
        part = model(batch.to(device))
        part.backward()
        loss += part.detach()
    params = parameters(optimizer)
    norm = gradient_norm(params)
    tripped = guard.watch(loss, norm)
    if max_norm is not None:
        clip_gradients(params, norm, max_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return DeviceScalars(loss, norm, tripped)


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
    console = console or Console()
    say = speaker(console)
    device, dtype = choose_device(config), COMPUTE_DTYPE[config.train.precision]
    mode = config.train.compile
    ops = choose_ops(config.kernels, device, dtype, compiled=mode != "off")
    set_tf32(config)
    check_compiler(mode, device)
    check_backends(config.log)
    check_start(config)
    with resume.locked(config.output_dir):
        _, spec, prepared = prepare_data(config, say)
        accounting = Accounting.of(config)
        plan = Plan(prepared, config.data, config.train, accounting.cost())
        if (summary := resume.completed(config, prepared.digest)) is not None:
            say(f"{config.output_dir} holds this run, complete: nothing to do")
            return RunResult(config.output_dir, None, summary)
        found = resume.find_checkpoint(config, prepared.digest, say)
        model = load_llava(config.model, ops, dtype, config.train.seed)
        trained = prepare_stage(model, config)
        model.to(device)
        compile_model(model, mode)
        optimizer = build_optimizer(trained.items(), config.optim)
        announce(config, model, trained, prepared, plan, device, say)
        say(f"compile: {mode}; tf32: {'on' if config.train.tf32 else 'off'}; kernels: {kernels_in_words(model)}")
        if found is not None:
            checkpoint.restore(found, trained, optimizer)
            say(f"resuming before step {found.step} from {found.folder}")
        write_json(config.output_dir / RUN_CONFIG, config.model_dump(mode="json"))
        throughput = Throughput.of(plan, accounting, device)
        first_step = found.step if found else 0
        return Trainer(config, model, trained, optimizer, throughput, prepared, spec, device, first_step, began, console).train()


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
        first_step: int,
        began: float,
        console: Console,
    ) -> None:
        self.config, self.model, self.trained, self.optimizer = config, model, trained, optimizer
        self.throughput, self.plan = throughput, throughput.plan
        self.prepared, self.spec, self.device = prepared, spec, device
        self.console, self.say = console, speaker(console)
        self.first_step = self.next_step = first_step
        self._began = began
        self._saved_step = first_step or -1
        self._saved_at = time.monotonic()
        self._pending: Callable[[], None] = _nothing

    def train(self) -> RunResult:
        """Run every step that is left and write the result."""
        out = self.config.output_dir
        try:
            with stop_requests() as stopped, Metrics(self.config, self.next_step, self.plan.n_steps, self.console) as metrics:
                self._steps(metrics, lambda: bool(stopped))
            plot_loss(out, f"{self.config.stage}: {out}")
        except (UserError, OSError, torch.OutOfMemoryError) as error:
            # Something the user can mend broke on the way: what was trained so far is kept.
            self.optimizer.zero_grad(set_to_none=True)
            self._save()
            raise self._in_words(error) from None
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            # PyTorch raises this from a signal handler, perhaps within the optimizer's step: what is in memory is not kept.
            raise UserError(
                f"data.workers: {' '.join(str(error).split())}; free memory or write fewer data.workers, and start the same command again"
            ) from None
        if self.next_step < self.plan.n_steps:
            if not self._save():
                raise UserError(f"output_dir: {out} took no checkpoint when the run was stopped at step {self.next_step}; make room there")
            self.say(
                f"stopped by {stopped[0].name} before step {self.next_step} of {self.plan.n_steps}; the same command goes on from there"
            )
            return RunResult(out, stopped[0], self._summarize("interrupted"))
        try:
            left = write_result(self.model, self.config)
        except OSError as error:
            self._save()
            raise UserError(f"output_dir: {out} did not take the result ({error}); make room and start the same command again") from None
        summary = self._summarize("complete")
        self.say(
            f"complete: loss {summary['final_loss']:.4f}, {summary['samples']:,} samples in {summary['step_seconds']:.0f} s, "
            f"{summary['samples_per_second']:.1f} samples/s, {summary['tokens_per_second']:,.0f} tokens/s, goodput {summary['goodput']:.0%}"
        )
        for path in left:
            self.say(f"left {path}")
        return RunResult(out, None, summary)

    def _steps(self, metrics: Metrics, stop: Callable[[], bool]) -> None:
        guard = FiniteGuard(self.optimizer, self.device)
        on_gpu = self.device.type == "cuda"
        try:
            began = time.perf_counter()
            for step, batches in steps(self.plan, self.next_step, self.prepared, self.spec, self.config.data, pin=on_gpu):
                waited = time.perf_counter() - began
                factor = lr_factor(step.index, self.plan.n_steps, self.config.optim)
                set_lr(self.optimizer, factor)
                scalars = train_step(self.model, self.optimizer, guard, batches, self.device, self.config.optim.max_grad_norm)
                # The optimizer has moved: first of all count that, so that whatever fails below saves the state under its number.
                self.next_step = step.index + 1
                before = self._pending
                self._pending = self._recorder(metrics, step, scalars, factor, waited, time.perf_counter() - began)
                # The row of the step before: its numbers have arrived while this step was being launched.
                before()
                began = time.perf_counter()
                if stop():
                    break
                if self._save_due():
                    self._record_pending()
                    self._save()
                    began = time.perf_counter()
        finally:
            self._record_pending()

    def _record_pending(self) -> None:
        pending, self._pending = self._pending, _nothing
        pending()

    def _recorder(
        self, metrics: Metrics, step: Step, scalars: DeviceScalars, factor: float, waited: float, seconds: float
    ) -> Callable[[], None]:
        """Writes the step's row when called, once its numbers are on the host."""

        def record() -> None:
            loss, norm, tripped = scalars.read()
            if tripped:
                self._fail_on_non_finite(step, loss, norm)
            row: dict[str, float | int] = {
                "step": step.index,
                "loss": loss,
                "grad_norm": norm,
                "lr": self.config.optim.lr * factor,
                **self.throughput.step(step, seconds, waited),
            }
            if self.device.type == "cuda":
                row["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
            metrics.write(row)

        return record

    def _fail_on_non_finite(self, step: Step, loss: float, norm: float) -> None:
        """The guard has kept the optimizer still since before `step`, so the state in memory is the one before it."""
        self.next_step = step.index
        self._pending = _nothing
        ids = [self.prepared.row(int(i)).id for i in step.samples]
        path = self.config.output_dir / f"non_finite_step_{step.index}.json"
        write_json(path, {"step": step.index, "loss": str(loss), "grad_norm": str(norm), "samples": ids})
        raise UserError(
            f"step {step.index}: loss {loss}, gradient norm {norm}; the optimizer did not move, checkpoint-{step.index} holds the state "
            f"before it; look at the step's samples in {path} ({', '.join(ids[:4])}, ...), or lower optim.lr in a new output_dir"
        )

    def _in_words(self, error: UserError | OSError | torch.OutOfMemoryError) -> UserError:
        again = "and start the same command again"
        if isinstance(error, torch.OutOfMemoryError):
            rows = self.config.train.micro_batch_tokens
            return UserError(
                f"train.micro_batch_tokens: {rows} rows need too much GPU memory; write less, or train.recompute=full, {again}"
            )
        if isinstance(error, OSError):
            return UserError(f"output_dir: {self.config.output_dir} could not be written ({error}); make room {again}")
        self._summarize("failed")
        return error

    def _save_due(self) -> bool:
        train = self.config.train
        by_step = train.checkpoint_steps is not None and self.next_step % train.checkpoint_steps == 0
        by_time = train.checkpoint_minutes is not None and time.monotonic() - self._saved_at >= 60 * train.checkpoint_minutes
        return (by_step or by_time) and self.next_step < self.plan.n_steps

    def _save(self) -> bool:
        """Write a checkpoint; a disk that fails is reported and never stops the training."""
        if self.next_step == self._saved_step:
            return True
        self._saved_at = time.monotonic()
        out = self.config.output_dir
        try:
            folder = checkpoint.save(out, self.next_step, self.config, self.prepared.digest, self.trained, self.optimizer)
            checkpoint.keep_last(out, self.config.train.keep_checkpoints)
        except OSError as error:
            self.say(f"checkpoint before step {self.next_step} could not be written ({error}); older ones are untouched, training goes on")
            return False
        self._saved_step = self.next_step
        self.say(f"wrote {folder}")
        return True

    def _summarize(self, status: str) -> dict[str, Any]:
        facts = {
            "config": self.config.model_dump(mode="json"),
            "prepared_digest": self.prepared.digest,
            "prepared": str(self.prepared.folder),
            "records": self.plan.n_samples,
            "quarantined": self.prepared.manifest["quarantined"],
            "kernels": self.model.kernels(),
            "planned_steps": self.plan.n_steps,
        }
        return write_summary(self.config.output_dir, status, facts, self.first_step, time.monotonic() - self._began)


def _nothing() -> None:
    pass
