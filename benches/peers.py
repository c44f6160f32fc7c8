"""`fastllava bench peers`: one training step by fastllava and by what others run, on the same weights and samples.

A row is one JSON line: variant, stage, size, samples and rows a second, share of the peak and of the matmul ceiling, peak memory, and
the world it was measured in. The variants take turns in one process. What cannot run here, has too little memory, breaks or gives
another loss or gradient than the rest has a row too: `void` says why, and it has no time.
"""

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benches.ceilings import measure_matmul
from benches.models import size_named
from benches.ours import Fastllava, Run, plan_run
from benches.peer_registry import VARIANTS, Settings
from benches.results import Row, append
from benches.timing import Call, Times, peak_bytes, seconds_of
from benches.world import world
from fastllava.accounting import Stage, peak_flops
from fastllava.data.plan import Step
from fastllava.errors import UserError

OURS = "fastllava"
ORIGINAL = "original"
STAGES: Sequence[Stage] = ("pretrain", "finetune")
OUT_OF_MEMORY = "out of memory"
CANNOT = "cannot run here: "
FEWEST = 3
"""Turns, whatever the budget says."""
TOLERANCE = {torch.float32: (1e-5, 1e-3), torch.bfloat16: (1e-3, 3e-2)}
"""By dtype: how far from the variants' median a loss and the norm of a gradient may lie, relatively."""


@dataclass(frozen=True)
class Comparison:
    """What to measure."""

    device: torch.device
    sizes: Sequence[str]
    stages: Sequence[Stage]
    variants: Sequence[str]
    precision: str
    samples: int
    """Of a step."""
    seconds: float
    """Budget of the turns of one size and stage, of the clock on the wall."""
    layers: int | None = None
    overrides: Sequence[str] = ()
    """key=value words for fastllava's run."""

    def check(self) -> None:
        """Raises UserError for what is nothing to measure."""
        for option, names, known in (("--stages", self.stages, STAGES), ("--variants", self.variants, VARIANTS)):
            for name in names:
                if name not in known:
                    raise UserError(f"{option}: '{name}' is none of {', '.join(known)}")
        for name in self.sizes:
            size_named(name).with_layers(self.layers)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise UserError("--device: PyTorch finds no CUDA GPU here; write --device cpu")


@dataclass
class Trial:
    """What is known of a variant."""

    trainer: Any = None
    void: str | None = None
    loss: float | None = None
    norm: float | None = None
    peak: int | None = None
    taken: list[float] = field(default_factory=list)
    """Seconds of each turn."""
    losses: list[float] = field(default_factory=list)
    """Of each turn."""

    def fail(self, reason: str) -> None:
        """No time, and no memory kept."""
        self.void, self.trainer, self.taken = reason, None, []


def bench(comparison: Comparison, out: Path | None, say: Callable[[str], None]) -> list[Row]:
    """Measure all of it; the rows of a size and stage are appended to `out` together. Raises UserError on unknown names."""
    comparison.check()
    rows = []
    for size in comparison.sizes:
        for stage in comparison.stages:
            for row in compare(comparison, size, stage, say):
                rows.append(row)
                say(in_words(row))
                if out is not None:
                    append(out, row)
    return rows


def compare(comparison: Comparison, size: str, stage: Stage, say: Callable[[str], None]) -> Iterator[Row]:
    """The rows of one size and stage."""
    settings = Settings.of(comparison.device, size, stage, comparison.samples)
    train = {"precision": comparison.precision, "reference_micro_batch": settings.original, "micro_batch_tokens": settings.rows}
    run = plan_run(stage, size_named(size).with_layers(comparison.layers), train, comparison.overrides, comparison.samples)
    say(f"{size} {stage}: {run.n_steps} different steps of {comparison.samples} samples on {world(comparison.device)['device']}")
    trials = start(comparison, run, settings)
    for name, trial in trials.items():
        if trial.trainer is not None:
            attempt(trial, lambda trial=trial: judge_alone(trial, run.step(0), comparison.device), comparison.device)
        say(f"{name}: {trial.void or f'loss {trial.loss:.6f}, gradient norm {trial.norm:.5f}'}")
    agree(trials, run.dtype)
    ceiling = measure_matmul(comparison.device, run.dtype, min(1.0, comparison.seconds / 10))
    steps = take_turns(trials, run, comparison)
    agree(trials, run.dtype)
    for name in trials:
        yield row_of(name, trials, run, steps, comparison, size, ceiling)
    trials.clear()
    release(comparison.device)


def start(comparison: Comparison, run: Run, settings: Settings) -> dict[str, Trial]:
    """Build every variant that can run here. Ours holds the weights, so it is always built; frozen ones are the very same for all."""
    ours = Fastllava(run, comparison.device)
    trials: dict[str, Trial] = {}
    for name in comparison.variants:
        trial = trials[name] = Trial()
        if name == OURS:
            trial.trainer = ours
        elif (reason := VARIANTS[name].unsupported(comparison.device)) is not None:
            trial.fail(CANNOT + reason)
        else:
            build = VARIANTS[name].build
            attempt(trial, lambda trial=trial, build=build: _build(trial, build, run, ours, settings), comparison.device)
    return trials


def _build(trial: Trial, build: Callable[..., Any], run: Run, ours: Fastllava, settings: Settings) -> None:
    frozen = [name for name, parameter in ours.model.named_parameters() if not parameter.requires_grad]
    trial.trainer = build(run, ours.model, ours.device, settings, frozen)


def judge_alone(trial: Trial, step: Step, device: torch.device) -> None:
    """Loss, gradient norm and peak memory of one step. Where memory is short, with half the micro-batch, and half of that."""
    trainer = trial.trainer
    while True:
        batches, found = trainer.batches(step), []
        judged = {} if isinstance(trainer, Fastllava) else {"judged": True}
        call = Call(lambda _, batches=batches: found.append(trainer.step(batches, **judged)))
        try:
            if device.type == "cuda":
                # What libraries keep from their first call on is no part of a step.
                call.run(None)
            trial.peak = trainer.state_bytes() + peak_bytes(call, device)
        except torch.OutOfMemoryError:
            if isinstance(trainer, Fastllava) or trainer.micro_batch == 1:
                raise
            trainer.micro_batch //= 2
            trainer.drop_gradients()
            release(device)
            continue
        trial.loss, trial.norm = found[-1].read()[:2]
        return


def attempt(trial: Trial, act: Callable[[], None], device: torch.device) -> None:
    """`act()`; a trial that lacks memory or breaks is void, and the rest goes on."""
    try:
        act()
    except torch.OutOfMemoryError:
        trial.fail(OUT_OF_MEMORY)
    except UserError:
        raise
    except Exception as error:
        trial.fail(f"broke: {type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}")
    if trial.void is not None:
        release(device)


def agree(trials: Mapping[str, Trial], dtype: torch.dtype) -> None:
    """Make void what is not what most variants give: the loss of every turn and, of the first step, the gradient's norm."""
    loss_tolerance, norm_tolerance = TOLERANCE[dtype]
    alive = {name: trial for name, trial in trials.items() if trial.void is None and trial.loss is not None}
    checks = [("loss", loss_tolerance, {name: trial.loss for name, trial in alive.items()})]
    checks += [("gradient norm", norm_tolerance, {name: trial.norm for name, trial in alive.items()})]
    turns = min((len(trial.losses) for trial in alive.values()), default=0)
    checks += [("loss", loss_tolerance, {name: trial.losses[k] for name, trial in alive.items()}) for k in range(turns)]
    for what, tolerance, values in checks:
        for name, value in values.items():
            common = statistics.median(values.values())
            if not distance(value, common) <= tolerance and trials[name].void is None:
                trials[name].fail(f"wrong: {what} {value:.6g}, where the variants' median is {common:.6g}; allowed is a share of {tolerance:g}")


def distance(value: float, common: float) -> float:
    """Relative; absolute where the common value is zero."""
    return abs(value - common) / (abs(common) or 1.0)


def take_turns(trials: Mapping[str, Trial], run: Run, comparison: Comparison) -> list[Step]:
    """Every variant the same steps, one after the other, the first in turn another each time; the steps that were taken."""
    steps: list[Step] = []
    spent = 0.0
    alive = [name for name, trial in trials.items() if trial.void is None]
    while alive and (len(steps) < FEWEST or spent * (len(steps) + 1) / len(steps) < comparison.seconds):
        step = run.step(len(steps) + 1)
        first = len(steps) % len(alive)
        spent += seconds_of(lambda alive=alive, first=first, step=step: [
            attempt(trials[name], lambda name=name: take_turn(trials[name], step, comparison.device), comparison.device)
            for name in alive[first:] + alive[:first]
        ], comparison.device)  # fmt: skip
        alive = [name for name in alive if trials[name].void is None]
        steps.append(step)
    return steps


def take_turn(trial: Trial, step: Step, device: torch.device) -> None:
    """One step; what its loader or collator does is not timed."""
    batches = trial.trainer.batches(step)
    found: list[Any] = []
    trial.taken.append(seconds_of(lambda: found.append(trial.trainer.step(batches)), device))
    trial.losses.append(found[0].read()[0])


def row_of(
    name: str, trials: Mapping[str, Trial], run: Run, steps: Sequence[Step], comparison: Comparison, size: str, ceiling: float
) -> Row:
    """One line of results; figures that cannot be said are None."""
    trial, original = trials[name], trials.get(ORIGINAL)
    alive = [other for other in trials.values() if other.void is None]
    timed = trial.void is None
    seconds = sum(trial.taken) if timed else None
    rows = sum(run.work(step).rows for step in steps)
    needed = sum(run.accounting.model_flops(run.work(step)).total for step in steps)
    done = sum(done_flops(trial.trainer, run, step) for step in steps) if timed else None
    peak = peak_flops(world(comparison.device)["device"])
    times = Times.of([1e3 * taken for taken in trial.taken]) if timed else None
    faster = _faster(trial, original) if timed and original is not None and original.void is None else None
    common = statistics.median(other.loss for other in alive) if alive else None
    return {
        "variant": name,
        "stage": run.config.stage,
        "size": size,
        "layers": run.size.llama.num_hidden_layers,
        "dtype": comparison.precision,
        "samples_per_second": seconds and len(steps) * comparison.samples / seconds,
        "tokens_per_second": seconds and rows / seconds,
        "mfu": seconds and peak and needed / seconds / peak,
        "hfu": seconds and peak and done and done / seconds / peak,
        "ceiling_share": seconds and needed / seconds / ceiling / 1e12,
        "peak_bytes": trial.peak if timed else None,
        "step_ms_p20": times and times.p20,
        "step_ms_p50": times and times.p50,
        "step_ms_p80": times and times.p80,
        "times_original_p20": faster and faster.p20,
        "times_original_p50": faster and faster.p50,
        "times_original_p80": faster and faster.p80,
        "loss": trial.loss,
        "grad_norm": trial.norm,
        "error": None if common is None or trial.loss is None else distance(trial.loss, common),
        "turns": len(steps) if timed else 0,
        "samples_per_step": comparison.samples,
        "micro_batch": getattr(trial.trainer, "micro_batch", None),
        "micro_batch_tokens": run.config.train.micro_batch_tokens if name == OURS else None,
        "padding_share": padding(trial.trainer, run, steps) if timed else None,
        "attention": getattr(trial.trainer, "attention", None),
        "kernels": {room: use["implementation"] for room, use in trial.trainer.model.kernels().items()} if timed and name == OURS else None,
        "compile": run.config.train.compile if name == OURS else None,
        "model_flops": needed / len(steps) if steps else None,
        "hardware_flops": done and done / len(steps),
        "matmul_ceiling_tflops": ceiling,
        "void": trial.void,
    } | world(comparison.device)  # fmt: skip


def _faster(trial: Trial, original: Trial) -> Times:
    """Than the original's recipe, turn by turn."""
    return Times.of([theirs / mine for theirs, mine in zip(original.taken, trial.taken, strict=True)])


def done_flops(trainer: Any, run: Run, step: Step) -> float:
    """What a variant computes in a step."""
    if isinstance(trainer, Fastllava):
        return run.accounting.hardware_flops(run.work(step)).total
    return trainer.hardware_flops(step).total


def padding(trainer: Any, run: Run, steps: Sequence[Step]) -> float:
    """Share of the decoder's rows that no sample has."""
    if isinstance(trainer, Fastllava):
        return 0.0
    rows = sum(run.work(step).rows for step in steps)
    return 1 - rows / sum(trainer.rows(step) for step in steps)


def in_words(row: Row) -> str:
    """One line for the screen."""
    begin = f"{row['size']} {row['stage']} {row['variant']}: "
    if row["void"] is not None:
        return begin + f"void, {row['void']}"
    faster = "" if row["times_original_p50"] is None else f", {row['times_original_p50']:.2f} times the original's recipe"
    return (
        begin + f"{row['samples_per_second']:.3g} samples/s, {row['tokens_per_second']:,.0f} tokens/s, "
        f"{row['ceiling_share']:.0%} of the matmul ceiling, {row['peak_bytes'] / 2**30:.2f} GiB{faster}"
    )


def release(device: torch.device) -> None:
    """Give back what finished or failed work held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def failures(rows: Sequence[Row]) -> list[Row]:
    """Rows that are wrong or broke: void for a reason that is neither the machine nor its memory."""
    return [row for row in rows if row["void"] and not row["void"].startswith((CANNOT, OUT_OF_MEMORY))]
