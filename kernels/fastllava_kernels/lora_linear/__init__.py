"""Room lora_linear: frozen linear layers that share an input, each with a low-rank product that is trained."""

from fastllava_kernels.room import REFERENCE, Room

ROOM = Room.of_folder(
    "lora_linear",
    "Frozen linear layers of one input, each with its trained low-rank product and the dropout before that",
    ("triton", "torch", REFERENCE),
)
