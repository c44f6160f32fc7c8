"""`fastllava bench ablate`: every toggle of a run to each of its other values in turn, beside the run as it is.

A row is one JSON line: what changed, and by how much time, memory, loss and gradient did; both runs take turns in one process.
What cannot run here has a row too: `void` says why.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benches.models import size_named
from benches.ours import Fastllava, Run, plan_run
from benches.peer_registry import Settings
from benches.peer_rows import setting
from benches.peer_trials import CANNOT, Trial, attempt, check_device, check_stages, release, weigh
from benches.results import Row, append
from benches.timing import Times, seconds_of
from benches.world import world
from fastllava.config import Config, Stage, value_of
from fastllava.config.toggles import kernel_toggles, levers, train_toggles
from fastllava.data.plan import Step
from fastllava.errors import UserError

FEWEST = 3
"""Turns, whatever the budget says."""
ALONE = "train.micro_batch_tokens=1"
"""Every sample a micro-batch of its own: no packing, and no padding."""


@dataclass(frozen=True)
class Ablation:
    """What to measure."""

    device: torch.device
    sizes: Sequence[str]
    stages: Sequence[Stage]
    toggles: Sequence[str]
    """Keys to change, all toggles when empty."""
    samples: int
    """Of a step; 0: 8 on a CPU, 32 on a GPU."""
    seconds: float
    """Budget of one value's turns."""
    layers: int | None = None
    overrides: Sequence[str] = ()
    """key=value words for the run as it is."""

    def check(self) -> None:
        """Raises UserError for what is nothing to measure."""
        check_stages(self.stages)
        check_device(self.device)
        for name in self.sizes:
            size_named(name).with_layers(self.layers)
        known = sorted({key for key, _ in choices(self.device)} | {lever.key for lever in levers()})
        for key in self.toggles:
            if key not in known:
                raise UserError(f"--toggles: '{key}' is none of {', '.join(known)}")


def choices(device: torch.device, named: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """Every (key, value) that a run on `device` may have, as `fastllava toggles` lists them; of levers, another training, those `named`."""
    for toggle in (*kernel_toggles(device), *train_toggles(), *(lever for lever in levers() if lever.key in named)):
        if toggle.key != "train.device":
            yield from ((toggle.key, value) for value in toggle.values if value != "auto")
    key, _, value = ALONE.partition("=")
    yield key, value


def bench(ablation: Ablation, out: Path | None, say: Callable[[str], None]) -> list[Row]:
    """Measure all of it; each row is appended to `out` as soon as it is there. Raises UserError on unknown names and keys."""
    ablation.check()
    rows = []
    for size in ablation.sizes or (["7b"] if ablation.device.type == "cuda" else ["tiny"]):
        for stage in ablation.stages:
            for row in ablate(ablation, size, stage):
                rows.append(row)
                say(in_words(row))
                if out is not None:
                    append(out, row)
    return rows


def ablate(ablation: Ablation, size: str, stage: Stage) -> Iterator[Row]:
    """The rows of one size and stage."""
    device = ablation.device
    samples = ablation.samples or (32 if device.type == "cuda" else 8)
    plan = functools.partial(_plan, ablation, size, stage, samples)
    wanted = [(key, value) for key, value in choices(device, ablation.toggles) if not ablation.toggles or key in ablation.toggles]
    needs = {toggle.key: toggle.needs for toggle in kernel_toggles(device)}
    run, base, words = None, Trial(), ()
    # Stable: a toggle that changes nothing in the run as it is stands beside one in which it does.
    for key, value in sorted(wanted, key=lambda one: needs.get(one[0], ())):
        if run is None or words != needs.get(key, ()):
            base.trainer = None
            release(device)
            words, base = needs.get(key, ()), Trial()
            run = plan(*words)
            attempt(base, functools.partial(_start, base, run, device), device)
            if base.void is not None:
                raise UserError(f"bench ablate: the run as it is has no time, {base.void}; write --layers N, or a smaller size")
        if value == _now(run.config, base.trainer, key):
            continue
        trial = Trial()
        base.taken.clear()
        try:
            other = plan(*words, f"{key}={value}")
            attempt(trial, functools.partial(_compare, base, trial, other, ablation), device)
        except UserError as error:
            other = run
            trial.fail(CANNOT + str(error).splitlines()[0])
        yield row_of(key, value, base, trial, run, size) | world(device)
        trial.trainer = None
        release(device)


def _plan(ablation: Ablation, size: str, stage: Stage, samples: int, *words: str) -> Run:
    settings = Settings.of(ablation.device, stage, samples)
    train = {"precision": "bf16" if ablation.device.type == "cuda" else "fp32", "micro_batch_tokens": settings.rows}
    return plan_run(stage, size_named(size).with_layers(ablation.layers), train, [*ablation.overrides, *words], samples)


def _now(config: Config, trainer: Fastllava, key: str) -> str:
    """The value of the run as it is; of a room the implementation that was chosen."""
    section, _, name = key.partition(".")
    if section == "kernels":
        return trainer.model.chosen[name]
    value = value_of(config, key)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _start(trial: Trial, run: Run, device: torch.device) -> None:
    trial.trainer = Fastllava(run, device)
    trial.loss, trial.norm, trial.peak = weigh(trial.trainer, run.step(0), device)
    trial.check_finite()


def _compare(base: Trial, trial: Trial, other: Run, ablation: Ablation) -> None:
    device = ablation.device
    _start(trial, other, device)
    if trial.void is not None:
        return
    # Graphs for shapes that the first step did not have.
    trial.trainer.step(trial.trainer.batches(other.step(1)))
    began = time.perf_counter()
    while len(trial.taken) < FEWEST or (time.perf_counter() - began) * (1 + 1 / len(trial.taken)) <= ablation.seconds:
        index = len(trial.taken)
        pair = [base, trial] if index % 2 == 0 else [trial, base]
        for one in pair:
            one.taken.append(_seconds(one.trainer, one.trainer.run.step(index + 1), device))


def _seconds(trainer: Fastllava, step: Step, device: torch.device) -> float:
    batches = trainer.batches(step)
    return seconds_of(functools.partial(trainer.step, batches), device)


def row_of(key: str, value: str, base: Trial, trial: Trial, run: Run, size: str) -> Row:
    """One line of results; every difference is the changed run's less the run's as it is. Losses and norms are of one step."""
    timed = trial.void is None
    before, after = (Times.of([1e3 * each for each in one.taken]) if timed else None for one in (base, trial))
    differences = [1e3 * (changed - kept) for changed, kept in zip(trial.taken, base.taken, strict=True)] if timed else []
    delta = Times.of(differences) if timed else None
    both = (trial.loss, base.loss, trial.norm, base.norm, trial.peak, base.peak)
    loss, loss_before, norm, norm_before, peak, peak_before = both if timed else (None,) * 6
    return (
        {"toggle": key, "value": value, "baseline": _now(run.config, base.trainer, key)}
        | setting(run, size)
        | {
            "step_ms_p50": after and after.p50,
            "baseline_ms_p50": before and before.p50,
            "delta_ms_p20": delta and delta.p20,
            "delta_ms_p50": delta and delta.p50,
            "delta_ms_p80": delta and delta.p80,
            "delta_bytes": _less(peak, peak_before),
            "loss": loss,
            "delta_loss": _less(loss, loss_before),
            "grad_norm": norm,
            "delta_grad_norm": _less(norm, norm_before),
            "turns": len(trial.taken),
            "void": trial.void,
        }
    )


def _less(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


def in_words(row: Row) -> str:
    """One line for the screen."""
    begin = f"{row['size']} {row['stage']} {row['toggle']}={row['value']} in place of {row['baseline']}: "
    if row["void"] is not None:
        return begin + f"void, {row['void']}"
    return (
        begin
        + f"{row['delta_ms_p50']:+.4g} ms of {row['baseline_ms_p50']:.4g} ({row['delta_ms_p20']:+.3g} to {row['delta_ms_p80']:+.3g}), "
        f"{row['delta_bytes'] / 2**20:+.4g} MiB, loss {row['delta_loss']:+.2g}, gradient norm {row['delta_grad_norm']:+.2g}"
    )
