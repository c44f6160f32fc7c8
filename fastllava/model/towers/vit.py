"""What vision towers share: patches to rows, pre-norm blocks, and running only the blocks whose output is asked for.

Shape letters: I images, P patches an image, N rows an image (its class row first, where the tower has one), R = I N rows,
C width, H heads, K head width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllava.errors import UserError
from fastllava.model.compiled import Graph, eager
from fastllava.model.layers import Embedding, LayerNorm, Linear, multiply
from fastllava.model.ops import Ops

_ACTIVATIONS: Mapping[str, Callable[..., Tensor]] = {"gelu": F.gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}
"""By the word of a config.json, those that PyTorch computes; quick_gelu is a room."""


@dataclass(frozen=True)
class TowerConfig:
    """The fields of a tower's config.json that decide the computation; a kind of tower gives what transformers fills in where it is silent.

    Each kind is a class of its own, and says in capitals what all towers of it have in common.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float

    NAME: ClassVar[str]
    """What people call the kind."""
    MODEL_TYPE: ClassVar[str]
    """The model_type of its config.json."""
    WHOLE: ClassVar[str]
    """The model_type of a whole model, text half and all, whose vision part is such a tower."""
    CLASS_ROWS: ClassVar[int]
    """Rows before an image's patches, which no projector sees: 1 or 0."""
    PATCH_BIAS: ClassVar[bool]
    """Whether the map of patches has a bias."""
    PRE_NORM: ClassVar[bool]
    """Whether rows are normalised before the first block."""
    ACTIVATIONS: ClassVar[tuple[str, ...]]
    """The values of hidden_act that it may have."""
    MEAN: ClassVar[tuple[float, float, float]]
    """The mean of each channel of RGB in [0, 1], where no preprocessor config says another one."""
    STD: ClassVar[tuple[float, float, float]]
    CROPS: ClassVar[bool]
    """Whether its preprocessing cuts the centre out of an image that is not square, or squeezes the whole into the square."""

    @property
    def patches(self) -> int:
        """The number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def rows(self) -> int:
        """The rows of an image within the tower."""
        return self.CLASS_ROWS + self.patches


class PatchEmbedding(nn.Module):
    """One linear map of each patch; weight [C, 3, side, side], kept as the convolution that it is in files, and a bias [C] or none."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(config.hidden_size)) if config.PATCH_BIAS else None
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.num_channels, config.patch_size, config.patch_size))

    def forward(self, pixels: Tensor) -> Tensor:
        """[I, P, C] of pixels [I, 3, H, W]."""
        side = self.weight.shape[-1]
        grid = pixels.shape[-1] // side
        patches = pixels[..., : grid * side, : grid * side].unflatten(-1, (grid, side)).unflatten(-3, (grid, side))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)
        return F.linear(patches, self.weight.flatten(1).to(pixels.dtype), None if self.bias is None else self.bias.to(pixels.dtype))


class Embeddings(nn.Module):
    """Turns the patches of each image into rows: the class row first, where there is one, and a position added to each."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size)) if config.CLASS_ROWS else None
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = Embedding(config.rows, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """[I, N, C] of pixels [I, 3, H, W]."""
        rows = self.patch_embedding(pixels)
        if self.class_embedding is not None:
            rows = torch.cat((self.class_embedding.to(pixels.dtype).expand(len(pixels), 1, -1), rows), dim=1)
        return rows + self.position_embedding.weight.to(pixels.dtype)


class Attention(nn.Module):
    """Attention of every row to every row of its image."""

    def __init__(self, config: TowerConfig, ops: Ops) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.ops = config.num_attention_heads, ops.only("attention")
        self.k_proj = Linear(width, width, bias=True)
        self.v_proj = Linear(width, width, bias=True)
        self.q_proj = Linear(width, width, bias=True)
        self.out_proj = Linear(width, width, bias=True)

    def forward(self, x_RC: Tensor, cu_seqlens: Tensor, rows: int) -> Tensor:
        q, k, v = (each.unflatten(-1, (self.heads, -1)) for each in multiply(x_RC, self.q_proj, self.k_proj, self.v_proj))
        out = self.ops.attention(q, k, v, cu_seqlens, rows, False)
        return self.out_proj(out.flatten(1))


class MLP(nn.Module):
    """`fc2(act(fc1(x)))`."""

    def __init__(self, config: TowerConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops.only("quick_gelu") if config.hidden_act == "quick_gelu" else None
        self._activation = _ACTIVATIONS.get(config.hidden_act, F.gelu)
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        activation = self._activation if self.ops is None else self.ops.quick_gelu
        return self.fc2(activation(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm attention and MLP on the rows of all images, computed by `compute`: `compute_block`, or a graph of it."""

    def __init__(self, config: TowerConfig, ops: Ops, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.self_attn = Attention(config, ops)
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps, ops)
        self.mlp = MLP(config, ops)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps, ops)

        self._compute = compute

    def forward(self, x_RC: Tensor, cu_seqlens: Tensor, rows: int) -> Tensor:
        """[R, C]; cu_seqlens: int32 [I+1], the row where each image starts; `rows` of each image."""
        return self._compute(self, x_RC, cu_seqlens, rows)


def compute_block(block: Block, x_RC: Tensor, cu_seqlens: Tensor, rows: int) -> Tensor:
    """Compute `block`: attention and MLP, each added to its input."""
    x_RC = x_RC + block.self_attn(block.layer_norm1(x_RC), cu_seqlens, rows)
    return x_RC + block.mlp(block.layer_norm2(x_RC))


class Encoder(nn.Module):
    """The blocks, which share one graph."""

    def __init__(self, config: TowerConfig, ops: Ops, graph: Graph) -> None:
        super().__init__()
        compute = graph(compute_block)
        self.layers = nn.ModuleList(Block(config, ops, compute) for _ in range(config.num_hidden_layers))


class Transformer(nn.Module):
    """Everything under `vision_model.`; the name pre_layrnorm is transformers'. post_layernorm is kept, and never run here."""

    def __init__(self, config: TowerConfig, ops: Ops, graph: Graph) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps, ops) if config.PRE_NORM else None
        self.encoder = Encoder(config, ops, graph)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps, ops)


class Tower(nn.Module):
    """A tower of any kind; parameter names are transformers' own (`vision_model.encoder.layers.0...`).

    `select_layer` counts transformers' hidden_states: 0 is before the first block, i after the i-th, -1 after the last, and before
    post_layernorm. `graph` is what becomes of the function that computes a block.
    Raises UserError when the tower has no such layer or an activation that is none of its kind's.
    """

    def __init__(self, config: TowerConfig, ops: Ops, select_layer: int, graph: Graph = eager) -> None:
        super().__init__()
        if config.hidden_act not in config.ACTIVATIONS:
            known = " or ".join(config.ACTIVATIONS)
            raise UserError(f"model.vision_tower: hidden_act {config.hidden_act!r} in config.json; a {config.NAME} tower has {known}")
        states = config.num_hidden_layers + 1
        if not -states <= select_layer < states:
            raise UserError(
                f"model.select_layer: {select_layer}, but this tower has hidden states {-states} to {states - 1}; write -2 for LLaVA-1.5's"
            )
        self.config, self.blocks_needed = config, select_layer % states
        self.vision_model = Transformer(config, ops, graph)

    def idle_modules(self) -> set[nn.Module]:
        """The modules whose output is not asked for; their weights are kept, so that a checkpoint is whole."""
        parts = [*self.vision_model.encoder.layers[self.blocks_needed :], self.vision_model.post_layernorm]
        return {module for part in parts for module in part.modules()}

    def forward(self, pixels: Tensor) -> Tensor:
        """Features [I, P, C] of normalised pixels [I, 3, H, W], in their dtype: the selected hidden state without the class row."""
        rows = self.config.rows
        cu_seqlens = torch.arange(len(pixels) + 1, dtype=torch.int32, device=pixels.device) * rows
        # All images' rows in one axis, which is never of size 1: compiled, one graph then serves any number of images.
        x = self.vision_model.embeddings(pixels).flatten(0, 1)
        if self.vision_model.pre_layrnorm is not None:
            x = self.vision_model.pre_layrnorm(x)
        for block in self.vision_model.encoder.layers[: self.blocks_needed]:
            x = block(x, cu_seqlens, rows)
        return x.unflatten(0, (-1, rows))[:, self.config.CLASS_ROWS :]
