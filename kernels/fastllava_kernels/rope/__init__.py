"""Room rope: rotary position embedding of queries and keys."""

from fastllava_kernels.compiled import compiled, needs_compiler
from fastllava_kernels.contract import Contract
from fastllava_kernels.launch import needs_gpu
from fastllava_kernels.liger import needs_liger
from fastllava_kernels.room import REFERENCE, Implementation, Room

from .op import rope_liger
from .reference import check, rope
from .triton_op import rope_triton

ROOM = Room(
    name="rope",
    summary="Rotary position embedding of queries and keys",
    implementations={
        "triton": Implementation(rope_triton, needs_gpu, interpretable=True),
        "liger": Implementation(rope_liger, needs_liger, interpretable=True),
        "compiled": Implementation(compiled(rope), needs_compiler, auto_on=frozenset({"cuda"})),
        REFERENCE: Implementation(rope),
    },
    contract=Contract(check, no_gradient=("cos_TK", "sin_TK")),
)
