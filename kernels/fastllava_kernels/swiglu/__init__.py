"""Room swiglu: silu(gate) * up."""

from fastllava_kernels.compiled import compiled, needs_compiler
from fastllava_kernels.contract import Contract
from fastllava_kernels.launch import needs_gpu
from fastllava_kernels.liger import needs_liger
from fastllava_kernels.room import REFERENCE, Implementation, Room

from .op import swiglu_liger
from .reference import check, swiglu
from .triton_op import swiglu_triton

ROOM = Room(
    name="swiglu",
    summary="silu(gate) * up",
    implementations={
        "triton": Implementation(swiglu_triton, needs_gpu, interpretable=True),
        "liger": Implementation(swiglu_liger, needs_liger),
        "compiled": Implementation(compiled(swiglu), needs_compiler, auto_on=frozenset({"cuda"})),
        REFERENCE: Implementation(swiglu),
    },
    contract=Contract(check),
)
