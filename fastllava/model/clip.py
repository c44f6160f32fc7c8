"""CLIP's vision tower (Radford et al. 2021, arXiv 2103.00020), running only the blocks whose output is asked for.

Shape letters: I images, P patches an image, N = P + 1 rows an image (class row first), R = I N rows, C width, H heads, K head width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllava.errors import UserError
from fastllava.model.compiled import Graph, eager
from fastllava.model.layers import Embedding, LayerNorm, Linear
from fastllava.model.ops import Ops


@dataclass(frozen=True)
class ClipConfig:
    """The fields of a CLIP vision config.json that decide the computation; defaults are transformers' CLIPVisionConfig's."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @property
    def patches(self) -> int:
        """The number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2


class PatchEmbedding(nn.Module):
    """One linear map of each patch; weight [C, 3, side, side], kept as the convolution that it is in CLIP's files."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.num_channels, config.patch_size, config.patch_size))

    def forward(self, pixels: Tensor) -> Tensor:
        """[I, P, C] of pixels [I, 3, H, W]."""
        side = self.weight.shape[-1]
        grid = pixels.shape[-1] // side
        patches = pixels[..., : grid * side, : grid * side].unflatten(-1, (grid, side)).unflatten(-3, (grid, side))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)
        return F.linear(patches, self.weight.flatten(1).to(pixels.dtype))


class ClipEmbeddings(nn.Module):
    """Turns the patches of each image into rows: the class row first, and a position added to each."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = Embedding(config.patches + 1, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """[I, N, C] of pixels [I, 3, H, W]."""
        first = self.class_embedding.to(pixels.dtype).expand(len(pixels), 1, -1)
        return torch.cat((first, self.patch_embedding(pixels)), dim=1) + self.position_embedding.weight.to(pixels.dtype)


class ClipAttention(nn.Module):
    """Attention of every row to every row of its image."""

    def __init__(self, config: ClipConfig, ops: Ops) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.ops = config.num_attention_heads, ops.only("attention")
        self.k_proj = Linear(width, width, bias=True)
        self.v_proj = Linear(width, width, bias=True)
        self.q_proj = Linear(width, width, bias=True)
        self.out_proj = Linear(width, width, bias=True)

    def forward(self, x_RC: Tensor, cu_seqlens: Tensor, rows: int) -> Tensor:
        q, k, v = (project(x_RC).unflatten(-1, (self.heads, -1)) for project in (self.q_proj, self.k_proj, self.v_proj))
        out = self.ops.attention(q, k, v, cu_seqlens, rows, False)
        return self.out_proj(out.flatten(1))


class ClipMLP(nn.Module):
    """`fc2(act(fc1(x)))`."""

    def __init__(self, config: ClipConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops.only("quick_gelu") if config.hidden_act == "quick_gelu" else None
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        activation = F.gelu if self.ops is None else self.ops.quick_gelu
        return self.fc2(activation(self.fc1(x)))


class ClipBlock(nn.Module):
    """Pre-norm attention and MLP on the rows of all images, computed by `compute`: `compute_block`, or a graph of it."""

    def __init__(self, config: ClipConfig, ops: Ops, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.self_attn = ClipAttention(config, ops)
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps, ops)
        self.mlp = ClipMLP(config, ops)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps, ops)

        self._compute = compute

    def forward(self, x_RC: Tensor, cu_seqlens: Tensor, rows: int) -> Tensor:
        """[R, C]; cu_seqlens: int32 [I+1], the row where each image starts; `rows` of each image."""
        return self._compute(self, x_RC, cu_seqlens, rows)


def compute_block(block: ClipBlock, x_RC: Tensor, cu_seqlens: Tensor, rows: int) -> Tensor:
    """Compute `block`: attention and MLP, each added to its input."""
    x_RC = x_RC + block.self_attn(block.layer_norm1(x_RC), cu_seqlens, rows)
    return x_RC + block.mlp(block.layer_norm2(x_RC))


class ClipEncoder(nn.Module):
    """The blocks, which share one graph."""

    def __init__(self, config: ClipConfig, ops: Ops, graph: Graph) -> None:
        super().__init__()
        compute = graph(compute_block)
        self.layers = nn.ModuleList(ClipBlock(config, ops, compute) for _ in range(config.num_hidden_layers))


class ClipTransformer(nn.Module):
    """Everything under `vision_model.`; the name pre_layrnorm is transformers'. post_layernorm is kept, and never run here."""

    def __init__(self, config: ClipConfig, ops: Ops, graph: Graph) -> None:
        super().__init__()
        self.embeddings = ClipEmbeddings(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps, ops)
        self.encoder = ClipEncoder(config, ops, graph)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps, ops)


class ClipVision(nn.Module):
    """The tower; parameter names are transformers' own (`vision_model.encoder.layers.0...`).

    `select_layer` counts transformers' hidden_states: 0 is before the first block, i after the i-th, -1 after the last. `graph` is
    what becomes of the function that computes a block.
    Raises UserError when the tower has no such layer or an activation that is not CLIP's.
    """

    def __init__(self, config: ClipConfig, ops: Ops, select_layer: int, graph: Graph = eager) -> None:
        super().__init__()
        if config.hidden_act not in ("quick_gelu", "gelu"):
            raise UserError(f"model.vision_tower: hidden_act {config.hidden_act!r} in config.json; a CLIP tower has quick_gelu or gelu")
        states = config.num_hidden_layers + 1
        if not -states <= select_layer < states:
            raise UserError(
                f"model.select_layer: {select_layer}, but this tower has hidden states {-states} to {states - 1}; write -2 for LLaVA-1.5's"
            )
        self.config, self.blocks_needed = config, select_layer % states
        self.vision_model = ClipTransformer(config, ops, graph)

    def idle_modules(self) -> set[nn.Module]:
        """The modules whose output is not asked for; their weights are kept, so that a checkpoint is whole."""
        parts = [*self.vision_model.encoder.layers[self.blocks_needed :], self.vision_model.post_layernorm]
        return {module for part in parts for module in part.modules()}

    def forward(self, pixels: Tensor) -> Tensor:
        """Features [I, P, C] of normalised pixels [I, 3, H, W], in their dtype: the selected hidden state without the class row."""
        rows = self.config.patches + 1
        cu_seqlens = torch.arange(len(pixels) + 1, dtype=torch.int32, device=pixels.device) * rows
        # All images' rows in one axis, which is never of size 1: compiled, one graph then serves any number of images.
        x = self.vision_model.pre_layrnorm(self.vision_model.embeddings(pixels).flatten(0, 1))
        for block in self.vision_model.encoder.layers[: self.blocks_needed]:
            x = block(x, cu_seqlens, rows)
        return x.unflatten(0, (-1, rows))[:, 1:]
