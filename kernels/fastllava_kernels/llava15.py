"""The sizes of a LLaVA-1.5 micro-batch with each decoder, and the random tensors that workloads are made of."""

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastllava_kernels.workload import Shape


@dataclass(frozen=True)
class Decoder:
    """The sizes of a Llama decoder."""

    width: int
    """D, the width of the hidden states."""
    inner: int
    """F, the inner width of the MLP."""
    heads: int
    """H, the heads of the queries."""
    key_heads: int
    """G, the heads of keys and values."""
    head_dim: int
    """K, the width of a head."""
    vocabulary: int
    """V, the tokens in the vocabulary."""


DECODERS: Mapping[str, Decoder] = {
    "7b": Decoder(4096, 11008, 32, 32, 128, 32000),
    "13b": Decoder(5120, 13824, 40, 40, 128, 32000),
    "1.1b": Decoder(2048, 5632, 32, 4, 64, 32000),
    "tiny": Decoder(64, 96, 4, 2, 16, 211),
}
"""Vicuna 7B and 13B, TinyLlama 1.1B, and one for a CPU."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of the model sees."""

    rows: int
    """T, the packed rows."""
    samples: int
    """Samples, each with one image."""
    patches: int
    """P, the patches of all images."""
    tower_rows: int
    """The rows of all images in the tower: a class token more than patches for each."""
    tower_width: int
    """C, the width of the tower's hidden states."""
    tower_inner: int
    """The inner width of the tower's MLP."""
    tower_heads: int


BATCHES: Mapping[str, MicroBatch] = dict.fromkeys(DECODERS, MicroBatch(16384, 16, 9216, 16 * 577, 1024, 4096, 16)) | {
    "tiny": MicroBatch(64, 3, 30, 3 * 11, 32, 128, 4)
}
"""16 images through CLIP-L/14-336, beside 448 text tokens each on average; "tiny" for a CPU."""


def sizes(*names: str) -> list[tuple[str, Decoder, MicroBatch]]:
    """Return (name, decoder, micro-batch) of each name, or of all of them when none is given."""
    return [(name, DECODERS[name], BATCHES[name]) for name in names or DECODERS]


def in_both_stages(shapes: Mapping[str, Shape], learns: str) -> dict[str, Shape]:
    """Return each shape twice: where nothing but the projector learns, and as "<name>-stage2" where what `learns` names does too."""
    return {f"{name}{suffix}": {**shape, learns: flag} for name, shape in shapes.items() for suffix, flag in (("", 0), ("-stage2", 1))}


def text_lengths(rows: int, samples: int) -> list[int]:
    """Return the text tokens of each sample, at least 1, together `rows` (or `samples` when that is more).

    Log-normal, as conversations are: most are short, a few several times as long. Always the same for the same arguments.
    """
    rng = random.Random(665)
    shares = [rng.lognormvariate(0.0, 0.7) for _ in range(samples)]
    spare = max(rows - samples, 0)
    bounds = [int(spare * total / sum(shares)) for total in itertools.accumulate(shares, initial=0.0)]
    bounds[-1] = spare
    return [1 + end - start for start, end in itertools.pairwise(bounds)]


def sample_lengths(rows: int, patches: int, samples: int) -> list[int]:
    """Return the packed rows of each sample: its text and its share of the patches. Together `rows`, where that holds all patches."""
    return [text + image for text, image in zip(text_lengths(rows - patches, samples), image_lengths(patches, samples), strict=True)]


def image_lengths(patches: int, samples: int) -> list[int]:
    """Return the patches of each sample, as equal as can be."""
    return [patches * (i + 1) // samples - patches * i // samples for i in range(samples)]


PREFIX = 35
"""Text rows before an image in stage 2: the system message and the opening of the first question."""


def splice_rows(rows: int, patches: int, samples: int) -> tuple[list[int], list[int]]:
    """Return the packed rows of text and of patches, each ascending: in each sample some text, its image, the rest of the text."""
    text_rows: list[int] = []
    patch_rows: list[int] = []
    start = 0
    for text, image in zip(text_lengths(rows - patches, samples), image_lengths(patches, samples), strict=True):
        before = min(PREFIX, text)
        patch_rows += range(start + before, start + before + image)
        text_rows += [*range(start, start + before), *range(start + before + image, start + text + image)]
        start += text + image
    return text_rows, patch_rows


class Draw:
    """Random tensors on a device, always the same for the same seed, in the order they are asked for."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, learns: bool = False, master: bool = False) -> Tensor:
        """Draw normal numbers in the dtype; `learns`: takes a gradient; `master`: the same numbers kept in fp32 (or wider)."""
        drawn = torch.randn(shape, device=self.device, generator=self.generator) * scale
        drawn = drawn.to(self.dtype)
        if master:
            # Numbers that the dtype holds too: what differs from fp64 truth is the op's doing, not the rounding of a weight.
            drawn = drawn.to(torch.promote_types(self.dtype, torch.float32))
        return drawn.requires_grad_(learns)

    def integers(self, below: int, count: int) -> Tensor:
        """Draw int64 [count] in [0, below)."""
        return torch.randint(below, (count,), device=self.device, generator=self.generator)

    def subset(self, below: int, count: int) -> Tensor:
        """Draw different numbers below `below`, ascending: int32 [count]."""
        chosen = torch.randperm(below, device=self.device, generator=self.generator)[:count]
        return chosen.sort().values.int()

    def projector(self, tower_width: int, width: int) -> list[tuple[Tensor, Tensor]]:
        """Draw the two layers of a projector, weight [out, in] and bias [out], as masters that learn."""
        return [
            (self.normal(width, into, scale=into**-0.5, learns=True, master=True), self.normal(width, learns=True, master=True))
            for into in (tower_width, width)
        ]

    def text(self, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw what a splice puts beside the patches: the embedding [V, D], token ids [T], text rows and patch rows."""
        learns = bool(shape["embedding_learns"])
        embedding_VD = self.normal(shape["vocabulary"], shape["width"], learns=learns, master=learns)
        text_rows, patch_rows = (
            torch.tensor(rows, dtype=torch.int32, device=self.device)
            for rows in splice_rows(shape["rows"], shape["patches"], shape["samples"])
        )
        return embedding_VD, self.integers(shape["vocabulary"], len(text_rows) + len(patch_rows)), text_rows, patch_rows
