"""The original's projectors (llava/model/multimodal_projector/builder.py): `linear`, `mlpNx_gelu` and `identity`.

Each is a chain of Linear layers with an erf GELU between two. Where nobody asks for another, room projector_splice runs it together
with the splice; by itself it runs room projector_mlp.
"""

import re
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from fastllava.errors import UserError
from fastllava.model.layers import Linear
from fastllava.model.ops import Ops
from fastllava.model.projectors.base import Kind, Projector


class Chain(Projector):
    """Room projector_mlp with its weights, a token for each patch.

    Parameter names: `weight`, `bias` for linear; `0.weight`, `0.bias`, `2.weight`, ... for mlpNx_gelu; none for identity.
    """

    def __init__(self, projector_type: str, inputs: int, outputs: int, patches: int, ops: Ops) -> None:
        super().__init__(projector_type)
        self.ops = ops.only("projector_mlp")
        if projector_type == "linear":
            linear = Linear(inputs, outputs, bias=True)
            self.weight, self.bias = linear.weight, linear.bias
        elif projector_type == "identity":
            if inputs != outputs:
                raise UserError(
                    f"model.projector_type: identity needs a tower as wide as the LLM, here {inputs} and {outputs}; write mlp2x_gelu"
                )
        else:
            for index in range(int(re.findall(r"\d+", projector_type)[0])):
                self.add_module(str(2 * index), Linear(inputs if index == 0 else outputs, outputs, bias=True))

    def forward(self, features_IPC: Tensor) -> Tensor:
        return self.ops.projector_mlp(features_IPC.flatten(0, 1), self.chain())

    def chain(self) -> list[tuple[Tensor, Tensor]]:
        tensors = list(self.parameters())
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def operations(self) -> float:
        # The first Linear needs no gradient of its input.
        first = next((weight.numel() for weight in self.parameters()), 0)
        return super().operations() - 2.0 * first


def reference(weights: Mapping[str, Tensor], features_IPC: Tensor) -> Tensor:
    """Compute Linear -> erf GELU -> Linear ... in plain PyTorch, with the weights in their order: [I, P, D] of features [I, P, C]."""
    x, tensors = features_IPC, list(weights.values())
    for number, (weight, bias) in enumerate(zip(tensors[::2], tensors[1::2], strict=True)):
        x = F.linear(F.gelu(x) if number else x, weight, bias)
    return x


LINEAR = Kind(Chain, reference, remark="LLaVA's first projector")
MLP = Kind(Chain, reference, hf={"mlp2x_gelu": {"0.": "linear_1.", "2.": "linear_2."}})
IDENTITY = Kind(Chain, reference, remark="no projector at all")
