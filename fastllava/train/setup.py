"""What a run does before its first step, phase by phase: the data, the model it begins with, and all that its loop needs."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import nn

from fastllava.batch import ImageSpec
from fastllava.config import Config, as_written
from fastllava.console.speaker import Say, speaker
from fastllava.data.plan import Plan
from fastllava.data.prepared import PreparedSet
from fastllava.data.tokenizer import Tokenizer
from fastllava.disk import write_json
from fastllava.distributed.processes import Processes
from fastllava.distributed.sharding import Sharding, shard
from fastllava.model.execution import Execution
from fastllava.model.llava import Llava
from fastllava.model.ops import Ops
from fastllava.model.weights import load_llava
from fastllava.optim import build_optimizer
from fastllava.train import memory
from fastllava.train.announce import announce
from fastllava.train.dataset import open_data
from fastllava.train.held_out import HeldOut, announce_held_out, find_held_out
from fastllava.train.metrics.flops import Accounting
from fastllava.train.metrics.throughput import Throughput
from fastllava.train.samples import Asked, find_asked
from fastllava.train.stages import prepare_stage
from fastllava.train.state import checkpoint, resume, set_aside
from fastllava.train.state.checkpoint import RUN_CONFIG
from fastllava.train.state.fingerprint import fingerprint
from fastllava.train.watch.watchdog import Watchdog


@dataclass(frozen=True)
class Context:
    """What a run has from its first moment on."""

    config: Config
    group: Processes
    console: Console
    """Quiet on all processes but the first."""
    watch: Watchdog
    began: float
    """By `time.monotonic`."""

    @property
    def say(self) -> Say:
        """Print a line, on the first process."""
        return speaker(self.console)


@dataclass(frozen=True)
class Data:
    """The samples of a run and their order."""

    spec: ImageSpec
    prepared: PreparedSet
    plan: Plan
    accounting: Accounting
    tokenizer: Tokenizer
    held_out: HeldOut | None
    asked: Sequence[Asked]
    """The questions of `eval.samples`."""


@dataclass(frozen=True)
class Start:
    """The model as its files give it, on the CPU, and what output_dir holds of a run that began with it."""

    model: Llava
    held: resume.Held


@dataclass(frozen=True)
class Setup:
    """All that the loop of a run needs."""

    context: Context
    data: Data
    held: resume.Held
    device: torch.device
    sharding: Sharding
    model: Llava
    """On the device, in training mode, restored when the run is resumed; so is the optimizer."""
    trained: dict[str, nn.Parameter]
    """The parameters that train, by internal name."""
    optimizer: torch.optim.Optimizer
    throughput: Throughput

    @property
    def first_step(self) -> int:
        """The step that this start of the run begins with."""
        return self.held.checkpoint.step if self.held.checkpoint else 0


@contextmanager
def output_locked(context: Context) -> Iterator[None]:
    """Hold output_dir for this run. Raises UserError, on all processes, when another run holds it."""
    with ExitStack() as stack:
        with context.group.together():
            if context.group.first:
                stack.enter_context(resume.locked(context.config.output_dir))
        yield


def find_data(context: Context) -> Data:
    """Phase 1: the prepared set, made when it is not there, what of it is held out, and the schedule of the other samples."""
    config, group = context.config, context.group
    opened = open_data(config, context.say, group, context.watch.board)
    spec, prepared = opened.spec, opened.prepared
    with group.together():
        accounting = Accounting.of(config)
        held_out = find_held_out(config, prepared, opened.held_out)
        taken = held_out.samples if held_out is not None and held_out.of_records else None
        plan = Plan(prepared, config.data, config.train, accounting.cost(), group.world, taken)
    asked = group.on_first(lambda: find_asked(config, opened.tokenizer, spec, prepared, held_out))
    return Data(spec, prepared, plan, accounting, opened.tokenizer, held_out, asked)


def find_start(context: Context, data: Data, ops: Ops) -> Start:
    """Phase 2: the model to begin with, and what output_dir holds of this very run. Raises UserError when it holds another."""
    config, group = context.config, context.group
    with memory.while_setting_up(config, group.world), group.together():
        model = load_llava(config.model, Execution.of(config, ops), config.train.seed, config.lora)
    start = fingerprint(model, group)
    return Start(model, group.on_first(lambda: resume.look(config, data.prepared.digest, start, context.say)))


def make_ready(context: Context, data: Data, start: Start, device: torch.device) -> Setup:
    """Phase 3: the model on its devices, with an optimizer, as the run's last checkpoint has them when there is one."""
    config, group, say = context.config, context.group, context.say
    model, found = start.model, start.held.checkpoint
    _leave_out(context, data, found)
    sharding = Sharding(group, config.parallel)
    with memory.while_setting_up(config, group.world):
        with group.first_speaks():
            trained = prepare_stage(model, config, place=lambda model: shard(model, sharding, device))
            model.to(device)
        optimizer = build_optimizer(trained.items(), config.optim, config.train.seed)
        announce(config, model, trained, data.plan, device, sharding, say)
        if data.held_out is not None and group.first:
            announce_held_out(data.held_out, data.plan, data.prepared, say)
        if found is not None:
            with group.first_speaks():
                checkpoint.restore(found, trained, optimizer, group)
            say(f"resuming before step {found.step} from {found.folder}")
    with group.together():
        if group.first:
            write_json(config.output_dir / RUN_CONFIG, as_written(config))
    throughput = Throughput.of(data.plan, data.accounting, device)
    return Setup(context, data, start.held, device, sharding, model, trained, optimizer, throughput)


def _leave_out(context: Context, data: Data, found: checkpoint.Checkpoint | None) -> None:
    """Take the samples out of the schedule that the run goes on without."""
    config, plan = context.config, data.plan
    aside, first = ({}, 0) if found is None else (found.set_aside, found.step)
    plan.leave_out(context.group.on_first(lambda: set_aside.begin(config, data.prepared, aside, first)))
    if plan.left_out:
        context.say(f"{len(plan.left_out):,} samples are left out, listed in {config.output_dir / set_aside.SET_ASIDE}")
