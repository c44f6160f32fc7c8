"""How many decoder layers of a step fit on the GPU that is here, by the planner's arithmetic."""

import sys
from collections.abc import Callable, Mapping

import torch

from benches.lib.ours import Run
from fastllava.model.ops import reference_ops
from fastllava.planner.gpus import RESERVED, USABLE
from fastllava.planner.simulate import MicroBatch, bare_model, gpu_ops, simulate
from fastllava.train.stages import trained_parts

SHALLOW = 3
"""Layers of the smaller of two decoders between which bytes are linear in the layers."""

Extra = Callable[[int, int], float]
"""Bytes beside our step's own, of (parameters that train, parameters that are frozen)."""


def nothing_else(trained: int, frozen: int) -> float:
    """No bytes beside those of the step."""
    return 0.0


def layers_that_fit(run_of: Callable[[int], Run], layers: int, device: torch.device, extra: Extra = nothing_else) -> int:
    """At most `layers`, the size's own, and at least one; on a CPU all of them. `run_of` makes the run of so many layers."""
    if device.type != "cuda" or layers <= SHALLOW:
        return layers
    usable = USABLE * (torch.cuda.get_device_properties(device).total_memory - RESERVED)
    try:
        need = {depth: bytes_of(run_of(depth), extra) for depth in (SHALLOW, layers)}
    except Exception as error:
        # Without the arithmetic a step that lacks memory is tried again with fewer layers.
        sys.stderr.write(f"bench: memory could not be foreseen, {type(error).__name__}: {error}\n")
        return layers
    return fitting(need, usable, layers)


def fitting(need: Mapping[int, float], usable: float, layers: int) -> int:
    """Layers for `usable` bytes, where bytes are a straight line through the two points of `need`."""
    (few, at_few), (many, at_many) = sorted(need.items())
    each = (at_many - at_few) / (many - few)
    return max(1, min(layers, int(few + (usable - at_few) / each)))


def bytes_of(run: Run, extra: Extra = nothing_else) -> float:
    """The most that lives at once in a step: by the planner, on fake tensors, for the largest micro-batch of the run."""
    origin = run.origin
    model = bare_model(run.config, origin, reference_ops())
    trained = sum(p.numel() for part in trained_parts(model, run.config.stage) for p in part.parameters())
    frozen = sum(p.numel() for p in model.parameters()) - trained
    cost = simulate(run.config, origin, gpu_ops(run.config.kernels), MicroBatch.largest(run.plan, range(run.n_steps)), accumulates=True)
    return cost.peak + extra(trained, frozen)
