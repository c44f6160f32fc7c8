"""`fastllava bench ablate`: every toggle of a run to each of its other values in turn, beside the run as it is.

A row is one JSON line: what changed, and by how much time, memory, loss and gradient did; both runs take turns in one process.
What cannot run here has a row too: `void` says why.
"""

from collections.abc import Iterator, Sequence

import torch

from benches.lib.ours import Fastllava, Run
from benches.lib.request import Request
from benches.lib.results import CANNOT, OUT_OF_MEMORY, Row, Sheet, first_line
from benches.lib.rows import setting
from benches.lib.timing import Times, quantiles
from benches.lib.trials import Trial, attempt, release, turns
from benches.lib.world import world
from fastllava.config import Config, Stage, value_of
from fastllava.config.toggles import kernel_toggles, levers, train_toggles
from fastllava.errors import UserError
from fastllava.train.deterministic import allow_deterministic

ALONE = "train.micro_batch_tokens=1"
"""Every sample a micro-batch of its own: no packing, and no padding."""


def choices(device: torch.device, named: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """Every (key, value) that a run on `device` may have, as `fastllava toggles` lists them.

    Levers, which change the numerics, are among them where `named` has their keys.
    """
    for toggle in (*kernel_toggles(device), *train_toggles(), *(lever for lever in levers() if lever.key in named)):
        if toggle.key != "train.device":
            yield from ((toggle.key, value) for value in toggle.values if value != "auto")
    key, _, value = ALONE.partition("=")
    yield key, value


def bench(request: Request, sheet: Sheet, toggles: Sequence[str] = ()) -> list[Row]:
    """Measure the toggles with these keys, all when there is none; `request.seconds` is for one value.

    Raises UserError on unknown names and keys.
    """
    request.check()
    allow_deterministic()
    known = sorted({key for key, _ in choices(request.device)} | {lever.key for lever in levers()})
    for key in toggles:
        if key not in known:
            raise UserError(f"--toggles: '{key}' is none of {', '.join(known)}")
    for size, stage in request.pairs():
        idle = () if stage == "finetune" else _finetune_only(request.device)
        wanted = [(key, value) for key, value in choices(request.device, toggles) if key not in idle and (not toggles or key in toggles)]
        for row in ablate(request, size, stage, wanted, sheet):
            sheet.add(row, in_words)
    return sheet.rows


def _finetune_only(device: torch.device) -> list[str]:
    """Keys of the toggles that need adapters, which stage pretrain has not."""
    return [toggle.key for toggle in kernel_toggles(device) if any(word.startswith("lora.") for word in toggle.needs)]


def ablate(request: Request, size: str, stage: Stage, wanted: Sequence[tuple[str, str]], sheet: Sheet) -> Iterator[Row]:
    """The rows of one size and stage, those aside that `sheet` has."""
    device = request.device
    needs = {toggle.key: toggle.needs for toggle in kernel_toggles(device)}
    words, run, base = (), None, Trial()
    # Stable: a toggle that changes nothing in the run as it is stands beside one in which it does.
    for key, value in sorted(wanted, key=lambda one: needs.get(one[0], ())):
        if sheet.has(size=size, stage=stage, toggle=key, value=value):
            continue
        if run is None or words != needs.get(key, ()):
            base.trainer = None
            release(device)
            words = needs.get(key, ())
            run, base = _as_it_is(request, size, stage, words)
        if value == _now(run.config, base.trainer, key):
            continue
        trial = Trial()
        base.taken.clear()
        try:
            other = request.run(size, stage, run.size.llm.num_hidden_layers, [*words, f"{key}={value}"])
            attempt(trial, device, _compare, base, trial, other, device, request.seconds)
        except UserError as error:
            trial.fail(CANNOT + first_line(error))
        yield row_of(key, value, base, trial, run, size) | world(device)
        trial.trainer = None
        release(device)


def _as_it_is(request: Request, size: str, stage: Stage, words: Sequence[str]) -> tuple[Run, Trial]:
    """The run that toggles are changed in. Raises UserError where it has no time."""
    base = Trial()
    for depth in request.depths(size, stage, beside_another):
        run, base = request.run(size, stage, depth, words), Trial()
        attempt(base, request.device, _start, base, run, request.device)
        if base.void is None:
            return run, base
        if base.void != OUT_OF_MEMORY:
            break
    raise UserError(f"bench ablate: the run as it is has no time, {base.void}; write --layers N, or a smaller size")


def beside_another(trained: int, frozen: int) -> float:
    """Bytes of a second run between its steps: fp32 weights and AdamW's moments, and what is frozen."""
    return 12.0 * trained + 2.0 * frozen


def _now(config: Config, trainer: Fastllava, key: str) -> str:
    """The value of the run as it is; of a room the implementation that was chosen."""
    section, _, name = key.partition(".")
    if section == "kernels":
        return trainer.model.chosen[name]
    value = value_of(config, key)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _start(trial: Trial, run: Run, device: torch.device) -> None:
    trial.start(lambda: Fastllava(run, device), run.step(0), device)


def _compare(base: Trial, trial: Trial, other: Run, device: torch.device, seconds: float) -> None:
    _start(trial, other, device)
    if trial.void is not None:
        return
    # Graphs for shapes that the first step did not have.
    trial.trainer.step(trial.trainer.batches(other.step(1)))
    for index in turns(seconds):
        for one in [base, trial] if index % 2 == 0 else [trial, base]:
            one.turn(one.trainer.run.step(index + 1), device)


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
            **quantiles("delta_ms", delta),
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
    """What it changes."""
    return (
        f"in place of {row['baseline']} "
        f"{row['delta_ms_p50']:+.4g} ms of {row['baseline_ms_p50']:.4g} ({row['delta_ms_p20']:+.3g} to {row['delta_ms_p80']:+.3g}), "
        f"{row['delta_bytes'] / 2**20:+.4g} MiB, loss {row['delta_loss']:+.2g}, gradient norm {row['delta_grad_norm']:+.2g}"
    )
