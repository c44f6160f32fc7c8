"""Room quick_gelu: x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""

from fastllava_kernels.compiled import compiled, needs_compiler
from fastllava_kernels.contract import Contract
from fastllava_kernels.room import REFERENCE, Implementation, Room

from .reference import check, quick_gelu

ROOM = Room(
    name="quick_gelu",
    summary="x * sigmoid(1.702 x), the activation of OpenAI's CLIP",
    implementations={
        "compiled": Implementation(compiled(quick_gelu), needs_compiler, auto_on=frozenset({"cuda"})),
        REFERENCE: Implementation(quick_gelu),
    },
    contract=Contract(check),
)
