"""Room rope: rotary position embedding of queries and keys."""

from fastllava_kernels.compiled import compiled, needs_compiler
from fastllava_kernels.liger import needs_liger
from fastllava_kernels.room import REFERENCE, Implementation, Room

from .op import rope_liger
from .reference import rope

ROOM = Room(
    name="rope",
    summary="Rotary position embedding of queries and keys",
    implementations={
        "liger": Implementation(rope_liger, needs_liger, interpretable=True),
        "compiled": Implementation(compiled(rope), needs_compiler, auto_on=frozenset({"cuda"})),
        REFERENCE: Implementation(rope),
    },
)
