"""Piece `profile` of `fastllava bench gpu`: where the time of a step goes, by kernel, gaps and waits; and the trace where it is small."""

import gzip
from collections.abc import Sequence
from pathlib import Path

from benches import step as stepping
from benches.gpu.context import Context, Piece, say
from benches.gpu.fit import layers_that_fit
from benches.gpu.steps import stage_and_words
from benches.ours import Fastllava
from benches.peer_rows import setting
from benches.peer_trials import STAGES, release
from benches.results import Row
from benches.step_profile import profile_step
from benches.world import world

SMALL_TRACE = 8 * 2**20
"""Bytes of a compressed trace that is kept."""


def profile_units(size: str) -> list[str]:
    """The stages, and each as compiled layers."""
    return [f"{stage} {words}".strip() for words in ("", "train.compile=layer") for stage in STAGES]


def measure_profile(context: Context, unit: str) -> None:
    """A row of the whole step, then one for each operation; the table and, where it is small, the trace beside them."""
    stage, words = stage_and_words(unit)
    samples = context.samples("profile")
    layers = layers_that_fit(context.size, stage, samples, context.device, words)
    steps = stepping.Steps(context.device, [context.size], [stage], samples, 0.0, layers, words)
    run = stepping.plan_of(steps, context.size, stage)
    trainer = Fastllava(run, context.device)
    for index in range(stepping.WARM_UP):
        trainer.step(trainer.batches(run.step(index)))
    trace = context.folder / f"profile_{unit.replace(' ', '_').replace('=', '_')}.trace.json"
    found = profile_step(trainer, run.step(0), trace)
    say(f"{found.in_words()}\n{found.table}")
    shared = {**setting(run, context.size), "overrides": words}
    whole = {"operation": None, "milliseconds": found.milliseconds, "host_waits": found.host_waits, "idle_share": found.idle_share}
    context.note.row({**shared, **whole, **world(context.device)})
    for row in found.operations:
        context.note.row({**shared, **row})
    _keep_small(trace)
    del trainer
    release(context.device)


def _keep_small(trace: Path) -> None:
    """Compressed, or not at all."""
    packed = gzip.compress(trace.read_bytes(), 6)
    trace.unlink()
    if len(packed) <= SMALL_TRACE:
        trace.with_suffix(".json.gz").write_bytes(packed)


def profiles_in_words(rows: Sequence[Row]) -> str:
    """Idle time and what takes the most."""
    said = []
    for row in (row for row in rows if row["operation"] is None):
        idle = "" if row["idle_share"] is None else f", idle {row['idle_share']:.1%}"
        said.append(f"{' '.join([row['stage'], *row['overrides']])} {row['milliseconds']:.0f} ms{idle}")
    return ", ".join(said) or "nothing yet"


PROFILE = Piece("where a step's time goes", profile_units, measure_profile, profiles_in_words)
