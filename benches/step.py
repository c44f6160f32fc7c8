"""`fastllava bench step`: the trainer's own step at full size, on random weights and samples of the true lengths.

A row is one JSON line, of the fields that `bench peers` gives its variants. What lacks memory has a row too: `void` says so.
"""

from pathlib import Path

import torch

from benches.ceilings import measure_matmul
from benches.lib.ours import Fastllava, Run
from benches.lib.profile import profile_step
from benches.lib.request import Request
from benches.lib.results import Row, Sheet, append, finite, short_of_memory
from benches.lib.rows import OURS, figures, in_words, of_ours, setting
from benches.lib.trials import Trial, attempt, release, turns
from benches.lib.world import world

WARM_UP = 2
"""Steps on a GPU before the clock runs."""


def bench(request: Request, sheet: Sheet, profile: Path | None = None) -> list[Row]:
    """Measure every size and stage, with ever fewer layers where memory is short and the request lets it.

    profile: folder for where the time of a step goes. Raises UserError on unknown names and keys.
    """
    request.check()
    for size, stage in request.pairs():
        if sheet.has(size=size, stage=stage, overrides=list(request.overrides)):
            continue
        for depth in request.depths(size, stage):
            row = measure_step(request, request.run(size, stage, depth), size, sheet, profile)
            sheet.add(row, in_words)
            if not short_of_memory(row):
                break
    return sheet.rows


def measure_step(request: Request, run: Run, size: str, sheet: Sheet, profile: Path | None = None) -> Row:
    """The row of one run."""
    device, trial = request.device, Trial()
    attempt(trial, device, _measure, trial, run, device, request.seconds)
    taken = [] if trial.void is not None else trial.taken
    ceiling = measure_matmul(device, run.dtype, min(1.0, request.seconds / 10))
    row = (
        {"variant": OURS}
        | setting(run, size)
        | figures(run, [run.step(index) for index in range(len(taken))], taken, trial.trainer, ceiling, device)
        | {"peak_bytes": trial.peak if taken else None, "loss": finite(trial.loss), "grad_norm": finite(trial.norm)}
        | {"micro_batches": len(run.step(0).micro_batches)}
        | of_ours(run, trial.trainer)
        | {"void": trial.void}
        | world(device)
        | {"overrides": list(request.overrides), "host_waits": None, "idle_share": None}
    )
    if profile is not None and trial.void is None:
        row |= _profile(trial.trainer, run, size, request, sheet, profile)
    trial.trainer = None
    release(device)
    return row


def _measure(trial: Trial, run: Run, device: torch.device, seconds: float) -> None:
    trial.start(lambda: Fastllava(run, device), run.step(0), device)
    if trial.void is not None:
        return
    for index in range(WARM_UP if device.type == "cuda" else 0):
        trial.trainer.step(trial.trainer.batches(run.step(index)))
    for index in turns(seconds):
        trial.turn(run.step(index), device)


def _profile(trainer: Fastllava, run: Run, size: str, request: Request, sheet: Sheet, folder: Path) -> Row:
    """Write the table, the trace where it is small, and rows to profile.jsonl; what the step's own row says of it."""
    name = "_".join([size, run.config.stage, *request.overrides]).replace("=", "-")
    found = profile_step(trainer, run.step(0), folder / f"{name}.trace.json")
    found.write(folder / f"{name}.txt")
    sheet.say(f"wrote {folder / name}.txt: {found.in_words()}")
    shared = {**setting(run, size), "overrides": list(request.overrides)}
    waits = {"host_waits": found.host_waits, "idle_share": found.idle_share}
    append(folder / "profile.jsonl", {**shared, "operation": None, "milliseconds": found.milliseconds, **waits, **world(request.device)})
    for operation in found.operations:
        append(folder / "profile.jsonl", {**shared, **operation})
    return waits
