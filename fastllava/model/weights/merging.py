"""Adapters merged into the weights they lie on: W + scale * B A.

`fp32`, our own: computed in fp32 from W as it is stored and rounded once, to the dtype that is asked for. `fp16`, as the original's
scripts/merge_lora_weights.py (PEFT on a CPU): W, B and A are rounded to fp16 first, their product once more, and so is the sum.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from fastllava.errors import UserError

Merge = Literal["fp32", "fp16"]
MERGES: tuple[Merge, ...] = get_args(Merge)


@dataclass(frozen=True)
class LowRank:
    """What is to be added to weights: `scale` times the product of the B and the A of each."""

    scale: float
    tensors: Mapping[str, Tensor] = field(repr=False)
    """Every A [r, in] and B [out, r], by our name."""
    where: str
    """The config key or option that gave them and their folder: errors begin with it."""
    how: Merge = "fp32"
    before: Callable[[str, Tensor], object] = lambda name, weight: None
    """Gets the name of each weight that something is added to, and the weight as it was, in the dtype that is asked for."""

    @property
    def weights(self) -> set[str]:
        """The names of the weights that something is added to."""
        return {name.replace(".lora_A.weight", ".weight") for name in self.tensors if name.endswith(".lora_A.weight")}

    def check(self, shapes: Mapping[str, torch.Size], base: str) -> None:
        """Raises UserError when it does not fit weights of these shapes, by name, which `base` gave, or is not finite."""
        for name in sorted(self.weights):
            a, b = self._factors(name)
            wanted, found = [len(b), a.shape[1]], shapes.get(name)
            if found is None or list(found) != wanted:
                has = "has none" if found is None else f"has {list(found)}"
                raise UserError(f"{self.where} adapts {name} {wanted}, and {base} {has}; give the model that it was trained on")
            if not (a.isfinite().all() and b.isfinite().all()):
                raise UserError(
                    f"{self.where} holds NaN or infinity where it adapts {name}; give adapters of a training that has not diverged"
                )

    def merged(self, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] of that name in `dtype`, a tensor of its own, with what an adapter adds to it where there is one."""
        if name.replace(".weight", ".lora_A.weight") not in self.tensors:
            return weight.to(dtype, copy=True)
        self.before(name, weight.to(dtype))
        a, b = self._factors(name)
        if self.how == "fp16":
            product = b.half().float() @ a.half().float()
            return (weight.half() + (product * self.scale).half()).to(dtype)
        return torch.addmm(weight.float(), b.float(), a.float(), alpha=self.scale).to(dtype)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        module = name.removesuffix(".weight")
        return self.tensors[f"{module}.lora_A.weight"], self.tensors[f"{module}.lora_B.weight"]


NOTHING = LowRank(1.0, {}, "")
"""Weights stay as they are."""
