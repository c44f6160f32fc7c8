"""Pieces `step`, `peers` and `ablate` of `fastllava bench gpu`: steps as `fastllava bench step`, `peers` and `ablate` time them.

Where memory is short a stage runs with the decoder layers that fit, as the planner foresees them; its rows say how many. Predicted at 7b:
a unit of `step` takes 45 s (10 to build, 12 to warm up and weigh, 20 timed), a stage of `peers` 200 s, a toggle of `ablate` 10 s.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch

from benches import ablate as ablating
from benches import peers as comparing
from benches import step as stepping
from benches.gpu.context import Context, Piece, say
from benches.gpu.fit import layers_that_fit
from benches.peer_rows import failures
from benches.peer_trials import OUT_OF_MEMORY, STAGES
from benches.results import Row
from fastllava.config import Stage

STEPS = (
    *("", "train.recompute=selective", "train.compile=layer", "train.compile=layer train.recompute=selective"),
    *("train.recompute=full", "train.recompute=norms"),
)
"""Config keys of the timed steps, the most telling first."""
STEP_SECONDS, PEERS_SECONDS, ABLATE_SECONDS = 20.0, 120.0, 3.0
"""Of a step's turns, of a stage's, and of a value's."""
ABLATED_LAYERS = 8
"""At most: a layer is like any other, and two runs are kept at once."""
PEERS_RESERVE = 12 * 2**30
"""Bytes for what the peers' steps hold beside weights: logits of every row in fp32 and their gradient."""


def step_units(size: str) -> list[str]:
    """A stage and config keys."""
    found = [f"{stage} {words}".strip() for words in STEPS for stage in STAGES]
    # Where the decoder is frozen a step that keeps everything fits, and recomputing can only take longer.
    return sorted(found, key=lambda unit: unit.startswith("pretrain") and "recompute" in unit)


def measure_step(context: Context, unit: str) -> None:
    """A row; where memory is short one of each attempt, the last with layers that fit."""
    stage, words = stage_and_words(unit)
    samples = context.samples("step")

    def once(layers: int) -> Row:
        steps = stepping.Steps(context.device, [context.size], [stage], samples, context.seconds(STEP_SECONDS), layers, words)
        return stepping.measure_step(steps, context.size, stage, say)

    layers = layers_that_fit(context.size, stage, samples, context.device, words)
    for rows in _with_fewer_layers(layers, lambda layers: [once(layers)]):
        _note_steps(context, rows)


def stage_and_words(unit: str) -> tuple[Stage, tuple[str, ...]]:
    """Of "stage key=value ..."."""
    stage, *words = unit.split()
    return cast("Stage", stage), tuple(words)


def _with_fewer_layers(layers: int, attempt: Callable[[int], list[Row]]) -> Iterator[list[Row]]:
    """Rows of each attempt, until one that memory was enough for: of ours, where the row says whose it is."""
    while True:
        rows = attempt(layers)
        yield rows
        mine = [row for row in rows if row["variant"] == comparing.OURS]
        if layers == 1 or not any((row["void"] or "").startswith(OUT_OF_MEMORY) for row in mine):
            return
        layers = max(1, layers * 3 // 4)


def _note_steps(context: Context, rows: Sequence[Row]) -> None:
    for row in rows:
        say(comparing.in_words(row))
        failed = failures([row])
        context.note.row(row, f"{row['stage']} {row['variant']}: {row['void']}" if failed else None)


def steps_in_words(rows: Sequence[Row]) -> str:
    """The fastest of each stage."""
    said = []
    for stage in STAGES:
        timed = [row for row in rows if row["stage"] == stage and row["void"] is None and row["variant"] == comparing.OURS]
        if timed:
            best = max(timed, key=lambda row: row["ceiling_share"])
            said.append(f"{stage} {best['ceiling_share']:.0%} of the ceiling with {best['layers']} layers")
    return ", ".join(said) or "no step has a time"


# peers


def peer_units(size: str) -> list[str]:
    """The stages; stage 2 has the larger share of a training."""
    return sorted(STAGES)


def beside_peers(trained: int, frozen: int) -> float:
    """Bytes: the trained weights in bf16 beside our fp32 ones, which are the peers' masters too, and what their steps hold."""
    return 2.0 * trained + PEERS_RESERVE


def measure_peers(context: Context, unit: str) -> None:
    """The rows of every variant, in turns."""
    stage, words = stage_and_words(unit)
    samples = context.samples("peers")

    def once(layers: int) -> list[Row]:
        comparison = comparing.Comparison.of(
            context.device, [context.size], [stage], [], samples, seconds=context.seconds(PEERS_SECONDS), layers=layers, overrides=words
        )
        comparison.check()
        return list(comparing.compare(comparison, context.size, stage, say))

    for rows in _with_fewer_layers(layers_that_fit(context.size, stage, samples, context.device, words, beside_peers), once):
        _note_steps(context, rows)


def peers_in_words(rows: Sequence[Row]) -> str:
    """Ours beside the original's recipe."""
    mine = [row for row in rows if row["variant"] == comparing.OURS and row["times_original_p50"] is not None]
    said = [f"{row['stage']} {row['times_original_p50']:.2f} times the original's recipe" for row in mine]
    void = [f"{row['stage']} {row['variant']}" for row in rows if row["void"] is not None]
    return "; ".join([", ".join(said) or "no comparison has a time", *([f"void: {', '.join(void)}"] if void else [])])


def ablate_units(size: str) -> list[str]:
    """A stage and a toggle."""
    keys = dict.fromkeys(key for key, _ in ablating.choices(torch.device("cpu")))
    return [f"{stage} {key}" for stage in STAGES for key in keys if not key.startswith("parallel.")]


def beside_another(trained: int, frozen: int) -> float:
    """Bytes of a second run between its steps: fp32 weights and AdamW's moments, and what is frozen."""
    return 12.0 * trained + 2.0 * frozen


def measure_ablation(context: Context, unit: str) -> None:
    """A row for each other value."""
    stage, (key,) = stage_and_words(unit)
    samples = context.samples("ablate")
    layers = min(ABLATED_LAYERS, layers_that_fit(context.size, stage, samples, context.device, (), beside_another))
    ablation = ablating.Ablation(context.device, [context.size], [stage], [key], samples, context.seconds(ABLATE_SECONDS), layers)
    ablation.check()
    for row in ablating.ablate(ablation, context.size, stage):
        say(ablating.in_words(row))
        failed = failures([row])
        context.note.row(row, f"{unit}={row['value']}: {row['void']}" if failed else None)


def ablations_in_words(rows: Sequence[Row]) -> str:
    """What would be faster."""
    timed = [row for row in rows if row["void"] is None]
    faster = [row for row in timed if row["delta_ms_p80"] < 0]
    said = [f"{row['stage']} {row['toggle']}={row['value']} {row['delta_ms_p50'] / row['baseline_ms_p50']:+.1%}" for row in faster]
    return f"{len(timed)} values timed, {len(rows) - len(timed)} void" + (f"; faster: {', '.join(said)}" if said else "")


STEP = Piece("our steps", step_units, measure_step, steps_in_words)
PEERS = Piece("our steps and others' in turns", peer_units, measure_peers, peers_in_words)
ABLATE = Piece("every toggle", ablate_units, measure_ablation, ablations_in_words)
