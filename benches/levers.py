"""`fastllava bench levers`: what the loss of a short training becomes with each lever, beside the same training without.

A lever trades accuracy for memory or time, so its values are another training. A row is one JSON line: all runs begin with the same
random weights and go over the same few steps again and again, which they can learn by heart. The first row is a yardstick: every
sample a micro-batch of its own, the same training in another order of additions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benches.ablate import ALONE
from benches.models import Size, size_named
from benches.ours import Fastllava, plan_run
from benches.peer_registry import Settings
from benches.peer_rows import setting
from benches.peer_trials import CANNOT, check_device, check_stages
from benches.results import Row, append
from benches.world import world
from fastllava.config import Stage
from fastllava.config.toggles import levers
from fastllava.errors import UserError
from fastllava.optim import lr_factor, set_lr

DIFFERENT = 4
"""Steps that come again and again."""
RECIPE = ("train.precision=bf16", "optim.lr=1e-3", "optim.schedule=constant")
"""Of these runs: a rate at which random weights learn something in few steps. Words of the caller come after."""


@dataclass(frozen=True)
class Levers:
    """What to measure."""

    device: torch.device
    size: str
    stages: Sequence[Stage]
    levers: Sequence[str]
    """Keys, all when empty."""
    steps: int
    samples: int
    layers: int | None = None
    overrides: Sequence[str] = ()
    """key=value words for all runs."""

    def model(self) -> Size:
        """The shapes. Raises UserError for a size that is not there."""
        return size_named(self.size).with_layers(self.layers)

    def check(self) -> None:
        """Raises UserError for what is nothing to measure."""
        check_stages(self.stages)
        check_device(self.device)
        self.model()
        known = [lever.key for lever in levers()]
        for key in self.levers:
            if key not in known:
                raise UserError(f"--levers: '{key}' is none of {', '.join(known)}")


def bench(wanted: Levers, out: Path | None, say: Callable[[str], None]) -> list[Row]:
    """Measure all of it; each row is appended to `out` as soon as it is there. Raises UserError on unknown names and keys."""
    wanted.check()
    rows = []
    for stage in wanted.stages:
        base = _losses(wanted, stage)
        for words in _choices(wanted.levers):
            row = _row(wanted, stage, words, base)
            rows.append(row)
            say(in_words(row))
            if out is not None:
                append(out, row)
    return rows


def _choices(keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The yardstick, each value of each lever, and where both are wanted the optimizer's two together."""
    yield (ALONE,)
    for lever in levers():
        if not keys or lever.key in keys:
            yield from ((f"{lever.key}={value}",) for value in lever.values if value != lever.default)
    if not keys or {"optim.state", "optim.master"} <= set(keys):
        yield "optim.state=8bit", "optim.master=bf16"


def _losses(wanted: Levers, stage: Stage, words: Sequence[str] = ()) -> list[float]:
    """By step."""
    settings = {"micro_batch_tokens": Settings.of(wanted.device, stage, wanted.samples).rows}
    run = plan_run(stage, wanted.model(), settings, [*RECIPE, *wanted.overrides, *words], wanted.samples)
    trainer, losses = Fastllava(run, wanted.device), []
    for index in range(wanted.steps):
        set_lr(trainer.optimizer, lr_factor(index, wanted.steps, run.config.optim))
        losses.append(trainer.step(trainer.batches(run.step(index % DIFFERENT))).read()[0])
    return losses


def _row(wanted: Levers, stage: Stage, words: Sequence[str], base: list[float]) -> Row:
    run = plan_run(stage, wanted.model(), {}, [*RECIPE, *wanted.overrides], wanted.samples)
    found, void = None, None
    try:
        found = _losses(wanted, stage, words)
    except UserError as error:
        void = CANNOT + str(error).splitlines()[0]
    tail = max(DIFFERENT, wanted.steps // 10)
    gaps = [after / before - 1 for after, before in zip(found or [], base, strict=found is not None)]
    return (
        {"lever": " ".join(words)}
        | setting(run, wanted.size)
        | {
            "steps": wanted.steps,
            "loss_first": base[0],
            "loss_last": _mean(base[-tail:]),
            "lever_loss_last": found and _mean(found[-tail:]),
            "gap_last": found and _mean(gaps[-tail:]),
            "gap_largest": found and max(gaps, key=abs),
            "emulated": any(word.startswith("train.fp8") for word in words) and wanted.device.type != "cuda",
            "overrides": list(wanted.overrides),
            "void": void,
        }
        | world(wanted.device)
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def in_words(row: Row) -> str:
    """One line for the screen."""
    begin = f"{row['size']} {row['stage']} {row['lever']}: "
    if row["void"] is not None:
        return begin + f"void, {row['void']}"
    return (
        begin + f"loss {row['loss_first']:.4f} to {row['lever_loss_last']:.4f} in {row['steps']} steps, to {row['loss_last']:.4f} without; "
        f"relative gap {row['gap_last']:+.2e} in the last steps, at most {row['gap_largest']:+.2e}"
        + (", emulated" if row["emulated"] else "")
    )
