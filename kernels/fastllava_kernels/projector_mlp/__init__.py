"""Room projector_mlp: the projector alone, for people who place its rows themselves."""

from fastllava_kernels.contract import Contract
from fastllava_kernels.launch import needs_gpu
from fastllava_kernels.room import REFERENCE, Implementation, Room

from . import op
from .reference import check, projector_mlp

ROOM = Room(
    name="projector_mlp",
    summary="Linear layers with an exact GELU between two, from the tower's features to the decoder's width",
    implementations={
        "triton": Implementation(op.triton, needs_gpu, interpretable=True),
        "torch": Implementation(op.eager),
        REFERENCE: Implementation(projector_mlp),
    },
    contract=Contract(check, one_dtype=False),
)
