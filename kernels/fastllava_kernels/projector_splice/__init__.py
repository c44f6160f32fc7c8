"""Room projector_splice: project patches and write them beside the text embeddings into the packed hidden states."""

from fastllava_kernels.contract import Contract
from fastllava_kernels.launch import needs_gpu
from fastllava_kernels.room import REFERENCE, Implementation, Room

from . import op
from .reference import check, projector_splice

ROOM = Room(
    name="projector_splice",
    summary="Project patches and write them beside the text embeddings into the packed hidden states",
    implementations={
        "triton": Implementation(op.triton, needs_gpu, interpretable=True),
        "torch": Implementation(op.eager),
        REFERENCE: Implementation(projector_splice),
    },
    contract=Contract(check, one_dtype=False),
)
