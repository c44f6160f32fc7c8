"""How many decoder layers of a step have room on the GPU that is here, by the planner's arithmetic."""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence

import torch

from benches.models import Size, size_named
from benches.ours import Run, plan_run
from benches.peer_registry import Settings
from fastllava.config import Stage
from fastllava.model.ops import reference_ops
from fastllava.planner.gpus import RESERVED, USABLE
from fastllava.planner.simulate import MicroBatch, bare_model, gpu_ops, simulate
from fastllava.train.stages import trained_parts

SHALLOW = 3
"""Layers of the smaller of two decoders between which bytes are linear in the layers."""

Extra = Callable[[int, int], float]
"""Bytes beside our step's own, of (parameters that train, parameters that are frozen)."""


def nothing_else(trained: int, frozen: int) -> float:
    """The step alone."""
    return 0.0


@functools.cache
def layers_that_fit(
    size: str, stage: Stage, samples: int, device: torch.device, words: tuple[str, ...] = (), extra: Extra = nothing_else
) -> int:
    """At most the size's own layers, and at least one. On a CPU all of them. `words`: config keys of the run."""
    full = size_named(size)
    layers = full.llama.num_hidden_layers
    if device.type != "cuda" or layers <= SHALLOW:
        return layers
    room = USABLE * (torch.cuda.get_device_properties(device).total_memory - RESERVED)
    try:
        need = {depth: bytes_of(run_of(full, depth, stage, samples, device, words), extra) for depth in (SHALLOW, layers)}
    except Exception as error:
        # Without the arithmetic a step that lacks memory is tried again with fewer layers.
        sys.stderr.write(f"bench gpu: memory could not be foreseen, {type(error).__name__}: {error}\n")
        return layers
    return fitting(need, room, layers)


def fitting(need: Mapping[int, float], room: float, layers: int) -> int:
    """Layers for `room` bytes, where bytes are a straight line through the two points of `need`."""
    (few, at_few), (many, at_many) = sorted(need.items())
    each = (at_many - at_few) / (many - few)
    return max(1, min(layers, int(few + (room - at_few) / each)))


def run_of(size: Size, layers: int, stage: Stage, samples: int, device: torch.device, words: Sequence[str]) -> Run:
    """The run that `bench step` times with so many layers."""
    train = {"precision": "bf16" if device.type == "cuda" else "fp32", "micro_batch_tokens": Settings.of(device, stage, samples).rows}
    return plan_run(stage, size.with_layers(layers), train, words, samples)


def bytes_of(run: Run, extra: Extra = nothing_else) -> float:
    """The most that lives at once in a step: by the planner, on tensors without data, for the largest micro-batch of the run."""
    model = bare_model(run.config, run.size.architecture, reference_ops())
    trained = sum(p.numel() for part in trained_parts(model, run.config.stage) for p in part.parameters())
    frozen = sum(p.numel() for p in model.parameters()) - trained
    cost = simulate(
        run.config, run.size.architecture, gpu_ops(run.config.kernels), MicroBatch.largest(run.plan, range(run.n_steps)), accumulates=True
    )
    return cost.peak + extra(trained, frozen)
