"""What the pieces of `fastllava bench gpu` are measured with: device, size, folder, how much of everything; and the piece's log."""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benches import kernels as timing_kernels
from benches.ceilings import Ceilings, measure
from benches.gpu.state import Notebook
from benches.results import Row

SAMPLES = {"step": (64, 4), "peers": (32, 2), "ablate": (32, 2), "profile": (64, 2)}
"""Of a step, on a GPU and on a CPU."""


@dataclass
class Context:
    """What a unit is measured with."""

    device: torch.device
    size: str
    folder: Path
    note: Notebook

    @property
    def on_gpu(self) -> bool:
        """Whether figures mean anything."""
        return self.device.type == "cuda"

    def seconds(self, on_gpu: float) -> float:
        """A budget; on a CPU, where only whether it runs is of interest, none."""
        return on_gpu if self.on_gpu else 0.0

    def samples(self, piece: str) -> int:
        """Of a step."""
        return SAMPLES[piece][0 if self.on_gpu else 1]

    @property
    def dtype(self) -> str:
        """That rooms are measured in."""
        return "bf16" if self.on_gpu else "fp32"

    @functools.cached_property
    def ceilings(self) -> Ceilings:
        """Measured once a process."""
        return measure(self.device, timing_kernels.DTYPES[self.dtype], self.seconds(0.5))


def indivisible(unit: str) -> list[str]:
    """The `split` of units that are measured as a whole or not at all."""
    return []


@dataclass(frozen=True)
class Piece:
    """What is measured together, and how."""

    summary: str
    units: Callable[[str], list[str]]
    """Of a size, in their order: what has to be done for the piece to be whole."""
    measure: Callable[[Context, str], None]
    """One unit; its rows go to the context's notebook."""
    words: Callable[[Sequence[Row]], str]
    """What the rows so far say, in one line."""
    split: Callable[[str], list[str]] = indivisible
    """Smaller units to try in place of one that broke off."""


def say(line: str) -> None:
    """To the log."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
