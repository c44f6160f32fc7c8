"""Room quick_gelu: x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""

from fastllava_kernels.room import REFERENCE, Room

ROOM = Room.of_folder(
    "quick_gelu",
    "x * sigmoid(1.702 x), the activation of OpenAI's CLIP",
    ("compiled", REFERENCE),
)
