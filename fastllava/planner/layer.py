"""The least that a decoder layer must read and write for a micro-batch, and what it does read and write, op by op.

The floor takes every op's inputs and outputs once, as the workloads of the rooms do, and fuses what can be fused beside products:
q, k and v are one product, gate and up another, both additions to the residual are one with the norm after them, weights are
in the compute dtype already, and gradients of weights are summed in fp32 by the product itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fastllava.config import Config
from fastllava.model.execution import COMPUTE_DTYPE
from fastllava.model.llama import LlamaConfig
from fastllava.planner.simulate import Dispatched, MicroBatch, gpu_ops, layer_ops
from fastllava.planner.sizes import Size
from fastllava.planner.tally import BACKWARD, FORWARD
from fastllava_kernels import rooms
from fastllava_kernels.workload import Pass, Shape

NORMS = {"input norm", "post norm"}
_REPEATED = {
    "none": set[str](),
    "norms": NORMS | {"rope", "swiglu"},
    "selective": NORMS | {"rope", "swiglu", "gate_up"},
    "full": NORMS | {"rope", "swiglu", "gate_up", "qkv", "attention", "o"},
}
"""What backward computes again with each `train.recompute` (fastllava.model.recompute)."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer, one micro-batch of several."""

    ops: Mapping[tuple[str, str], Dispatched]
    """Those that move anything, by part of the step, and op."""
    floor: Mapping[str, float]
    """Bytes by part of the step."""
    dispatched: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """How many ops, views too, by part of the step and namespace."""

    def total(self, part: str) -> Dispatched:
        """All ops of a part together."""
        found = [op for (where, _), op in self.ops.items() if where == part]
        return Dispatched(sum(op.count for op in found), sum(op.bytes for op in found))

    def calls(self, part: str) -> float:
        """How many ops the host dispatches in a part, whether they move anything or not."""
        return sum(count for (where, _), count in self.dispatched.items() if where == part)


def look_at(config: Config, size: Size, micro_batch: MicroBatch) -> Layer:
    """What the layer of `config` and `size` does on a GPU, by the ops that `auto` takes on one, and its floor.

    Raises ValueError for a decoder that is no Llama: its floor is not known.
    """
    if not isinstance(size.llm, LlamaConfig):
        raise ValueError(f"the floor of a decoder layer is known for Llama's only, not for {type(size.llm).__name__}")
    dtype, trains = COMPUTE_DTYPE[config.train.precision], config.stage == "finetune"
    parts = _parts(size.llm, micro_batch, dtype, trains)
    backward = sum(moved[1] for moved in parts.values())
    again = {**parts, "input norm": _norm_again(size.llm, micro_batch.rows, dtype, trains)}
    repeated = sum(again[name][0] for name in _REPEATED[config.train.recompute])
    floor = {FORWARD: sum(moved[0] for moved in parts.values()), BACKWARD: backward + repeated}
    found = layer_ops(config, size.origin, gpu_ops(config.kernels), micro_batch)
    return Layer(found.moving, floor, found.all)


def _parts(llm: LlamaConfig, size: MicroBatch, dtype: torch.dtype, trains: bool) -> Mapping[str, tuple[float, float]]:
    """The least bytes of each part of a layer, forward and backward."""
    width, inner, rows = llm.hidden_size, llm.intermediate_size, size.rows
    queries, keys = llm.num_attention_heads * llm.head_dim, llm.num_key_value_heads * llm.head_dim

    def product(takes: int, gives: int) -> tuple[float, float]:
        once = (rows * (takes + gives) + takes * gives) * dtype.itemsize
        # The weight's gradient reads the input and the output's gradient, and adds to fp32 sums.
        weight = rows * (takes + gives) * dtype.itemsize + 2 * 4 * takes * gives
        return once, once + trains * weight

    def op(room: str, **shape: int) -> tuple[float, float]:
        return _cost(room, shape, dtype, "forward"), _cost(room, shape, dtype, "backward")

    norm = op("add_rms_norm", rows=rows, width=width, weight_learns=int(trains))
    heads = {"heads": llm.num_attention_heads, "key_heads": llm.num_key_value_heads, "head_dim": llm.head_dim}
    # Each row of q, k, v and the result once, whatever samples the rows are of.
    once = rows * (2 * queries + 2 * keys) * dtype.itemsize
    return {
        "input norm": norm,
        "qkv": product(width, queries + 2 * keys),
        "rope": op("rope", rows=rows, **heads),
        "attention": (once, 2 * once),
        "o": product(queries, width),
        "post norm": norm,
        "gate_up": product(width, 2 * inner),
        "swiglu": op("swiglu", rows=rows, width=inner),
        "down": product(inner, width),
    }


def _norm_again(llm: LlamaConfig, rows: int, dtype: torch.dtype, trains: bool) -> tuple[float, float]:
    """The least bytes of a layer's first norm, whose sum is there."""
    shape = {"rows": rows, "width": llm.hidden_size, "weight_learns": int(trains)}
    return _cost("rms_norm", shape, dtype, "forward"), 0.0


def _cost(room: str, shape: Shape, dtype: torch.dtype, part: Pass) -> float:
    return rooms()[room].workload.cost(shape, dtype, part).bytes
