"""Room attention: attention of packed samples, each row seeing its own sample only.

`auto` takes FlashAttention by PyTorch where it runs and takes the model's heads; else the reference, or `sdpa` in a graph of
torch.compile. The others are taken by name.
"""

from fastllava_kernels.room import REFERENCE, Room

ROOM = Room.of_folder(
    "attention",
    "Attention of packed samples, each row seeing its own sample only",
    ("varlen", "fa3", "fa4", "xformers", REFERENCE, "sdpa"),
)
