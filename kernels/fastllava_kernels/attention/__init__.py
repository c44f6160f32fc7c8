"""Room attention: attention of packed samples, each row seeing its own sample only.

`auto` takes the newest FlashAttention that runs here and takes the model's heads: on a GPU of compute capability 9.x version 3,
then 4, where they are installed, and else version 2, which PyTorch has. Version 4 comes second, as on an H100 it has not overtaken
version 3 for packed samples (torchtitan 4413). Without FlashAttention it takes the reference, or `sdpa` in a graph of torch.compile.
"""

from fastllava_kernels.room import REFERENCE, Room

ROOM = Room.of_folder(
    "attention",
    "Attention of packed samples, each row seeing its own sample only",
    ("fa3", "fa4", "varlen", "xformers", REFERENCE, "sdpa"),
)
