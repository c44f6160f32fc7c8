"""What every projector is: a module from the tower's features to tokens of the decoder's width, and what others must know about it.

Shape letters: I images, P patches an image, N tokens an image, C tower width, D decoder width.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastllava.model.ops import Ops


class Projector(nn.Module):
    """Turns features [I, P, C] into the tokens [I * N, D] of the images, in the features' dtype, whatever dtype its weights are kept in.

    The names of its parameters are those of the files it is kept in, after `mm_projector.`.
    """

    def __init__(self, projector_type: str) -> None:
        super().__init__()
        self.projector_type = projector_type

    def forward(self, features_IPC: Tensor) -> Tensor:
        raise NotImplementedError

    def chain(self) -> list[tuple[Tensor, Tensor]] | None:
        """(weight [out, in], bias [out]) of each Linear, when it is Linear layers with an erf GELU between two and nothing else; else None.

        Room projector_splice can then run it.
        """
        return None

    def operations(self) -> float:
        """Floating-point operations of forward and backward for one token, where the features need no gradient; products alone."""
        return 6.0 * sum(weight.numel() for weight in self.parameters() if weight.ndim == 2)

    def draw(self, seed: int) -> dict[str, Tensor]:
        """Fresh fp32 weights by name, as `nn.Linear` and `nn.LayerNorm` begin, from a generator of their own seeded with `seed`."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        # nn.Linear draws the weight, then the bias, and both names come in this order; so the numbers are the very ones
        # that torch.manual_seed(seed) followed by nn.Linear(...) gives.
        fan_in: int | None = None
        for name, parameter in self.named_parameters():
            value = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            if name.endswith("weight"):
                fan_in = parameter.shape[1] if parameter.ndim == 2 else None
                drawn[name] = value.fill_(1) if fan_in is None else nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
            elif fan_in is None:
                drawn[name] = value.zero_()
            else:
                drawn[name] = value.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)
        return drawn


def _one_for_each(patches: int) -> int:
    return patches


@dataclass(frozen=True)
class Kind:
    """A kind of projector: how one is built, how many tokens it gives, and where its files are understood."""

    build: Callable[[str, int, int, int, Ops], Projector]
    """Makes one from `model.projector_type`, the widths C and D, the patches an image P, and the ops. Raises UserError on a misfit."""
    reference: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    """The same in plain PyTorch, for the certificate and the tests: of weights by name and features [I, P, C], the tokens [I, N, D]."""
    tokens: Callable[[int], int] = _one_for_each
    """N for P patches. Raises UserError for a grid of patches that does not fit."""
    hf: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By the types that llava-hf's layout holds: its beginnings of names, after `multi_modal_projector.`, by ours."""
    original: bool = True
    """Whether the original's own code builds it from `mm_projector_type`."""
    remark: str | None = None
    """Why a model with it is another one than LLaVA-1.5, as a run announces it."""
