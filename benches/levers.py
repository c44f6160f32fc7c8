"""`fastllava bench levers`: what the loss of a short training becomes with each lever, beside the same training without.

A lever trades accuracy for memory or time, so its values change the numerics. A row is one JSON line: all runs begin with the same
random weights and go over the same few steps again and again, which they can learn by heart. The first row is a yardstick: every
sample a micro-batch of its own, the same training in another order of additions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from benches.ablate import ALONE
from benches.lib.ours import Fastllava
from benches.lib.request import Request
from benches.lib.results import CANNOT, Row, Sheet, first_line
from benches.lib.rows import setting
from benches.lib.world import world
from fastllava.config import Stage
from fastllava.config.toggles import levers
from fastllava.errors import UserError
from fastllava.optim import lr_factor, set_lr

DIFFERENT = 4
"""Steps that come again and again."""
RECIPE = ("train.precision=bf16", "optim.lr=1e-3", "optim.schedule=constant")
"""Config keys of these runs: a rate at which random weights learn something in few steps. Words of the caller come after."""


def bench(request: Request, sheet: Sheet, wanted: Sequence[str], steps: int) -> list[Row]:
    """Train `steps` steps with each of the `wanted` levers, all when empty. Raises UserError on unknown names and keys."""
    request.check()
    known = [lever.key for lever in levers()]
    for key in wanted:
        if key not in known:
            raise UserError(f"--levers: '{key}' is none of {', '.join(known)}")
    learning = replace(request, overrides=[*RECIPE, *request.overrides])
    for size, stage in request.pairs():
        base = _losses(learning, size, stage, steps)
        for words in _choices(wanted):
            row = _row(learning, size, stage, words, steps, base) | {"overrides": list(request.overrides)}
            sheet.add(row, in_words)
    return sheet.rows


def _choices(keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The yardstick, each value of each lever, and where both are wanted the optimizer's two together."""
    yield (ALONE,)
    for lever in levers():
        if not keys or lever.key in keys:
            yield from ((f"{lever.key}={value}",) for value in lever.values if value != lever.default)
    if not keys or {"optim.state", "optim.master"} <= set(keys):
        yield "optim.state=8bit", "optim.master=bf16"


def _losses(request: Request, size: str, stage: Stage, steps: int, words: Sequence[str] = ()) -> list[float]:
    """The loss of every step."""
    run = request.run(size, stage, request.layers, words)
    trainer, losses = Fastllava(run, request.device), []
    for index in range(steps):
        set_lr(trainer.optimizer, lr_factor(index, steps, run.config.optim))
        losses.append(trainer.step(trainer.batches(run.step(index % DIFFERENT))).read()[0])
    return losses


def _row(request: Request, size: str, stage: Stage, words: Sequence[str], steps: int, base: list[float]) -> Row:
    found, void = None, None
    try:
        found = _losses(request, size, stage, steps, words)
    except UserError as error:
        void = CANNOT + first_line(error)
    tail = max(DIFFERENT, steps // 10)
    gaps = [after / before - 1 for after, before in zip(found or [], base, strict=found is not None)]
    return (
        {"lever": " ".join(words)}
        | setting(request.run(size, stage, request.layers), size)
        | {
            "steps": steps,
            "loss_first": base[0],
            "loss_last": _mean(base[-tail:]),
            "lever_loss_last": found and _mean(found[-tail:]),
            "gap_last": found and _mean(gaps[-tail:]),
            "gap_largest": found and max(gaps, key=abs),
            "emulated": any(word.startswith("train.fp8") for word in words) and not request.on_gpu,
            "void": void,
        }
        | world(request.device)
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def in_words(row: Row) -> str:
    """Loss with and without, and how far apart they are."""
    return (
        f"loss {row['loss_first']:.4f} to {row['lever_loss_last']:.4f} in {row['steps']} steps, to {row['loss_last']:.4f} without; "
        f"relative gap {row['gap_last']:+.2e} in the last steps, at most {row['gap_largest']:+.2e}"
        + (", emulated" if row["emulated"] else "")
    )
