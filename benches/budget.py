"""`fastllava bench budget`: what a decoder layer dispatches and moves, and what every Triton kernel moves, beside the least. No GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch

from benches.lib.ours import config_of
from fastllava.config import Recompute, Stage
from fastllava.planner.layer import Layer, look_at
from fastllava.planner.simulate import Dispatched, MicroBatch
from fastllava.planner.sizes import size_named
from fastllava.planner.tally import BACKWARD, FORWARD

COMMAND = "fastllava bench budget --write kernels/budget.md"
SIZE = "7b"
MICRO_BATCH = MicroBatch(rows=16384, samples=19, images=16, supervised=2400, longest=1500)
"""One of stage finetune; a layer's bytes go with its rows alone."""
LIMITS = {"swiglu": 1.0, "rope": 1.0, "splice": 1.06}
"""The most that a room's kernels may move in a pass, over the floor of its workload. What the others move is listed."""
DISPATCHED: Mapping[str, int] = {"pretrain": 60, "finetune": 95}
"""The most ops that the host may dispatch for a layer and micro-batch with `train.recompute=none`, both passes, views too.

At 4,096 rows, the smallest micro-batch that the planner looks at, a layer takes an H200 5.3 and 7.6 ms (reckoned, lab book). Of that the
host may take a tenth, 530 and 760 us, which is 8 us an op with the launch of its kernel.
"""
Layers = Mapping[tuple[Stage, Recompute], Layer]
Traffic = Mapping[str, Any]
"""A line of fastllava_kernels._tuning.traffic."""


@dataclass(frozen=True)
class Budget:
    """Both tables."""

    layers: Layers
    kernels: Sequence[Traffic]

    def problems(self) -> list[str]:
        """Layers and rooms over their limit, in words."""
        dispatched = {stage: _calls(layer) for (stage, recompute), layer in self.layers.items() if recompute == "none"}
        return [
            f"{stage}: {count:g} ops dispatched for a layer, {DISPATCHED[stage]} at most"
            for stage, count in dispatched.items()
            if count > DISPATCHED[stage]
        ] + [
            f"{room} ({shape}, {run}): {moved / floor:.3f} of its floor, {LIMITS[room]} at most"
            for (room, shape, run), (moved, floor) in _by_room(self.kernels).items()
            if room in LIMITS and moved > (LIMITS[room] + 0.005) * floor
        ]

    def render(self) -> str:
        """Both in Markdown."""
        return "\n".join([*_head(), *_layers(self.layers), *_ops(self.layers), *_kernels(self.kernels), *_rooms(self.kernels)]) + "\n"


def count(size: str = SIZE, rooms: Sequence[str] = (), recomputes: Sequence[Recompute] = get_args(Recompute)) -> Budget:
    """Count everything anew, or some of it: minutes for 7B and all rooms."""
    return Budget(layers(size, recomputes), kernels(rooms))


def layers(size: str, recomputes: Sequence[Recompute]) -> Layers:
    """What a decoder layer does in both stages."""
    return {
        (stage, recompute): look_at(_config(stage, recompute), size_named(size), MICRO_BATCH)
        for stage in get_args(Stage)
        for recompute in recomputes
    }


def kernels(rooms: Sequence[str] = ()) -> list[Traffic]:
    """What the Triton kernels of these rooms, or of all, move: in a process of its own, which the interpreter wants from the start."""
    command = [sys.executable, "-m", "fastllava_kernels._tuning.traffic", *rooms]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [json.loads(line) for line in said.splitlines()]


def differences(committed: str, now: str) -> list[str]:
    """The lines that changed; another PyTorch may dispatch other ops, so for that the kernels alone count."""
    before, after = committed.splitlines(), now.splitlines()
    if _version() not in committed:
        before, after = (lines[lines.index(_KERNELS) :] if _KERNELS in lines else lines for lines in (before, after))
    return [f"- {line}" for line in before if line not in after] + [f"+ {line}" for line in after if line not in before]


def _config(stage: Stage, recompute: Recompute) -> Any:
    return config_of(stage, {"precision": "bf16", "micro_batch_tokens": MICRO_BATCH.rows, "recompute": recompute}, ())


def _version() -> str:
    return f"PyTorch {'.'.join(torch.__version__.split('.')[:2])}"


def _head() -> Iterator[str]:
    yield from ("# Budgets", "", f"By `{COMMAND}`, {_version()}. Counted on a CPU; nothing here was measured on a GPU.", "")


def _layers(layers: Layers) -> Iterator[str]:
    yield "## A decoder layer"
    yield ""
    yield f"{SIZE.upper()}, bf16, one micro-batch of two, {MICRO_BATCH.rows:,} rows, with the ops that `auto` takes on a GPU."
    most = " and ".join(f"{count} in stage {stage}" for stage, count in DISPATCHED.items())
    yield "Dispatched: all ops, views too, each of which takes the host's time. With `train.recompute=none` both passes together have"
    yield f"at most {most}: at 8 us an op, a tenth of the GPU's time at 4,096 rows."
    yield "Ops: those that move anything. Floor: every input and result once, with all fused that a product or a norm"
    yield "can take in (`fastllava/planner/layer.py`)."
    yield ""
    yield "| stage | recompute | pass | dispatched | ops | GB | floor | over floor |"
    yield "|---|---|---|---|---|---|---|---|"
    for (stage, recompute), layer in layers.items():
        for part in (FORWARD, BACKWARD):
            total, floor = layer.total(part), layer.floor[part]
            figures = f"{layer.calls(part):g} | {total.count:g} | {total.bytes / 1e9:.3f} | {floor / 1e9:.3f} | {total.bytes / floor:.2f}"
            yield f"| {stage} | {recompute} | {part} | {figures} |"
    yield ""


def _calls(layer: Layer) -> float:
    return sum(layer.calls(part) for part in (FORWARD, BACKWARD))


def _ops(layers: Layers) -> Iterator[str]:
    shown = {stage: layer for (stage, recompute), layer in layers.items() if recompute == "none"}
    yield "Op by op, with `train.recompute=none`:"
    yield ""
    yield f"| pass | op | {' | '.join(f'{stage} | GB' for stage in shown)} |"
    yield "|---|---|" + "---|---|" * len(shown)
    for key in sorted(
        {key for layer in shown.values() for key in layer.ops if key[0] in (FORWARD, BACKWARD)}, key=lambda key: (key[0] != FORWARD, key[1])
    ):
        found = [layer.ops.get(key, Dispatched(0, 0)) for layer in shown.values()]
        yield f"| {key[0]} | `{key[1]}` | {' | '.join(f'{op.count:g} | {op.bytes / 1e9:.3f}' for op in found)} |"
    yield ""


_KERNELS = "## Triton kernels"


def _kernels(found: Sequence[Traffic]) -> Iterator[str]:
    yield _KERNELS
    yield ""
    yield "In Triton's interpreter, with the widths of 7B, few rows, fp16, and the blocks of an H100."
    yield "Bytes that a mask leaves out are not moved. Over once: moved, over each byte that the kernel touches once; what is read again"
    yield "comes from a cache on a GPU. Evaluation, without gradients, is listed where another kernel runs or it moves something else."
    yield ""
    yield "| kernel | shape | pass | loaded | stored | over once |"
    yield "|---|---|---|---|---|---|"
    for one in _distinct(found):
        figures = f"{one['loaded']} | {one['stored']} | {(one['loaded'] + one['stored']) / one['once']:.3f}"
        yield f"| {one['kernel']} | {one['shape']} | {one['run']} | {figures} |"
    yield ""


def _distinct(found: Sequence[Traffic]) -> Iterator[Traffic]:
    """All but evaluation's that move what forward's do."""

    def key(one: Traffic) -> tuple[Any, ...]:
        return tuple(one[name] for name in ("kernel", "shape", "loaded", "stored"))

    training = {key(one) for one in found if one["run"] != "evaluation"}
    return (one for one in found if one["run"] != "evaluation" or key(one) not in training)


def _rooms(found: Sequence[Traffic]) -> Iterator[str]:
    yield "All kernels of a pass of a room, over the floor of its workload. A product reads its operands again for each"
    yield "block of its result. Below 1 the rest is not the kernels': `masked_linear_cross_entropy`, `nf4_linear` and `lora_linear` leave"
    yield "products of weights to the library, and PyTorch writes the zeros of an embedding's gradient."
    yield ""
    yield "| room | shape | pass | moved | floor | over floor | limit |"
    yield "|---|---|---|---|---|---|---|"
    for (room, shape, run), (moved, floor) in _by_room(found).items():
        if run != "evaluation":
            limit = f"{LIMITS[room]:.2f}" if room in LIMITS else ""
            yield f"| {room} | {shape} | {run} | {moved} | {floor:.0f} | {moved / floor:.3f} | {limit} |"


def _by_room(found: Sequence[Traffic]) -> Mapping[tuple[str, str, str], tuple[int, float]]:
    """Bytes moved and floor, by room, shape and pass."""
    rooms: dict[tuple[str, str, str], tuple[int, float]] = {}
    for one in found:
        key = one["room"], one["shape"], one["run"]
        rooms[key] = rooms.get(key, (0, 0.0))[0] + one["loaded"] + one["stored"], one["floor"]
    return rooms
