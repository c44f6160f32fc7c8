"""The projector from the tower's features to the decoder's width: `linear`, `mlpNx_gelu` or `identity`, as the original's builder."""

import math
import re

import torch
from torch import Tensor, nn

from fastllava.errors import UserError
from fastllava.model.layers import Linear


class Projector(nn.Module):
    """Linear layers with an erf GELU between two; room projector_splice runs them.

    Parameter names are the original's (llava/model/multimodal_projector/builder.py): `weight`, `bias` for linear;
    `0.weight`, `0.bias`, `2.weight`, ... for mlpNx_gelu; none for identity. Raises UserError on an unknown kind, and on
    identity between unequal widths.
    """

    def __init__(self, kind: str, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kind, self.inputs, self.outputs = kind, inputs, outputs
        depth = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
        if kind == "linear":
            linear = Linear(inputs, outputs, bias=True)
            self.weight, self.bias = linear.weight, linear.bias
        elif depth:
            for index in range(int(depth[1])):
                self.add_module(str(2 * index), Linear(inputs if index == 0 else outputs, outputs, bias=True))
        elif kind != "identity":
            raise UserError(f"model.projector_type: {kind!r} is no projector; write linear, identity or mlpNx_gelu, such as mlp2x_gelu")
        elif inputs != outputs:
            raise UserError(
                f"model.projector_type: identity needs a tower as wide as the LLM, here {inputs} and {outputs}; write mlp2x_gelu"
            )

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """(weight [out, in], bias [out]) of each Linear in order, as they are kept."""
        tensors = list(self.parameters())
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def draw(self, seed: int) -> dict[str, Tensor]:
        """Fresh fp32 weights by name: `nn.Linear`'s own initialisation, from a generator of their own seeded with `seed`."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        # nn.Linear draws the weight, then the bias, and both names come in this order; so the numbers are the very ones
        # that torch.manual_seed(seed) followed by nn.Linear(...) gives.
        fan_in = self.inputs
        for name, parameter in self.named_parameters():
            value = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            if name.endswith("weight"):
                fan_in = parameter.shape[1]
                drawn[name] = nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
            else:
                drawn[name] = value.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)
        return drawn
