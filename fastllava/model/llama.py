"""The decoder: the Llama family (Llama 2 and 3, Vicuna, Mistral, Qwen2, Qwen3) on packed samples.

Shape letters: T packed rows, M rows whose result is wanted, D width, H query heads, G key/value heads, K head width,
F width of the MLP, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastllava.config import Recompute
from fastllava.model.compiled import Graph, eager
from fastllava.model.layers import AddRMSNorm, Embedding, Linear, RMSNorm, StreamNorm
from fastllava.model.linears import PLAIN, Linears, project
from fastllava.model.lora import LoraLinear
from fastllava.model.ops import Ops
from fastllava.model.recompute import compute_layer, run_layers


@dataclass(frozen=True)
class Llama3Rope:
    """Frequency scaling of Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of a Llama-family config.json that decide the computation."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: float | Llama3Rope | None
    """A number divides every frequency ("linear")."""
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tied: bool
    """The head is the embedding."""
    window: int | None
    """Rows a row may look back, itself included; a longer sample is refused, as attention here is full."""
    qk_norm: bool = False
    """Each head's query and key is normed over its K columns before it is turned (Qwen3)."""

    @property
    def attention_width(self) -> int:
        """Columns of a head that attention gets."""
        return self.head_dim

    def products(self) -> dict[str, int]:
        """Weights of each product of a layer, in their order."""
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        sizes = {"q": queries, "k": keys, "v": keys, "o": queries, **dict.fromkeys(("gate", "up", "down"), self.intermediate_size)}
        return {name: self.hidden_size * size for name, size in sizes.items()}

    def inverse_frequencies(self) -> Tensor:
        """fp32 [K / 2]: radians per position."""
        frequencies = 1.0 / (self.rope_theta ** (torch.arange(0, self.head_dim, 2, dtype=torch.float32, device="cpu") / self.head_dim))
        scaling = self.rope_scaling
        if scaling is None:
            return frequencies
        if not isinstance(scaling, Llama3Rope):
            return frequencies / scaling
        wavelengths = 2 * math.pi / frequencies
        longest, shortest = (scaling.original_max_position_embeddings / f for f in (scaling.low_freq_factor, scaling.high_freq_factor))
        blend = scaling.original_max_position_embeddings / wavelengths - scaling.low_freq_factor
        blend = blend / (scaling.high_freq_factor - scaling.low_freq_factor)
        blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
        return torch.where(wavelengths > longest, frequencies / scaling.factor, torch.where(wavelengths < shortest, frequencies, blended))


@dataclass(frozen=True)
class Packing:
    """What every layer needs to know about the packed rows."""

    cos: Tensor
    """[T, K] in the compute dtype."""
    sin: Tensor
    """[T, K] in the compute dtype."""
    cu_seqlens: Tensor
    """int32 [S+1]."""
    max_seqlen: int
    row_keys: Tensor | None
    """int64 [T]: what the dropout of adapters is drawn by; None where nothing is dropped."""

    def keys_of(self, wanted: Tensor | None) -> Tensor | None:
        """The keys of the wanted rows."""
        return self.row_keys if wanted is None or self.row_keys is None else self.row_keys.index_select(0, wanted)


class Attention(nn.Module):
    """Causal attention inside each sample, with rotary positions and grouped keys and values.

    Keys and values are of all T rows; with `wanted`, int64 [M], queries and results are of those rows only. The other queries
    are zeros for the attention op, which takes as many queries as keys: the wanted rows of several turns are no suffix of
    their sample, which alone variable-length kernels would take. What attention makes of the zeros is never read, so it
    gets a zero gradient and gives none to keys and values.
    """

    def __init__(self, config: LlamaConfig, ops: Ops, linears: Linears) -> None:
        super().__init__()
        self.head_dim, self.ops = config.head_dim, ops.only("rope", "attention")
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = linears.build("q_proj", config.hidden_size, queries, config.qkv_bias)
        self.k_proj = linears.build("k_proj", config.hidden_size, keys, config.qkv_bias)
        self.v_proj = linears.build("v_proj", config.hidden_size, keys, config.qkv_bias)
        self.o_proj = linears.build("o_proj", queries, config.hidden_size, config.output_bias)
        self.q_norm, self.k_norm = (RMSNorm(config.head_dim, config.rms_norm_eps, ops) if config.qk_norm else None for _ in range(2))

    def forward(self, x_TD: Tensor, packing: Packing, wanted: Tensor | None = None) -> Tensor:
        """[T, D], or [M, D] of the wanted rows."""
        row_keys, wanted_keys = packing.row_keys, packing.keys_of(wanted)
        if wanted is None:
            projected = project(x_TD, row_keys, self.q_proj, self.k_proj, self.v_proj)
        else:
            q = self.q_proj(x_TD.index_select(0, wanted), wanted_keys)
            projected = q, *project(x_TD, row_keys, self.k_proj, self.v_proj)
        q, k, v = (each.unflatten(-1, (-1, self.head_dim)) for each in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if wanted is not None:
            # Turned after they are laid out, so that rope needs no positions of its own for them: zeros stay zeros.
            q = q.new_zeros(k.shape[0], *q.shape[1:]).index_copy(0, wanted, q)
        q, k = self.ops.rope(q, k, packing.cos, packing.sin)
        out = self.ops.attention(q, k, v, packing.cu_seqlens, packing.max_seqlen, True)
        if wanted is not None:
            out = out.index_select(0, wanted)
        return self.o_proj(out.flatten(1), wanted_keys)


class MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: LlamaConfig, ops: Ops, linears: Linears) -> None:
        super().__init__()
        self.ops = ops.only("swiglu")
        self.gate_proj = linears.build("gate_proj", config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.up_proj = linears.build("up_proj", config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = linears.build("down_proj", config.intermediate_size, config.hidden_size, config.mlp_bias)

    def forward(self, x_TD: Tensor, row_keys: Tensor | None = None) -> Tensor:
        return self.down_proj(self.ops.swiglu(*project(x_TD, row_keys, self.gate_proj, self.up_proj)), row_keys)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, computed by `compute`: `compute_layer`, or a graph of it.

    Hooks of the layer, such as those that gather and free its shards, run around `compute`.
    """

    def __init__(self, config: LlamaConfig, ops: Ops, linears: Linears, compute: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.self_attn = Attention(config, ops, linears)
        self.mlp = MLP(config, ops, linears)
        self.input_layernorm = StreamNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.post_attention_layernorm = AddRMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.sums_in_norm = self.input_layernorm.sums_in_norm
        """Whether `norm_input` adds and norms in one op, which keeps little beside the sum."""
        self._compute = compute

    def forward(
        self, x_TD: Tensor, residual_TD: Tensor | None, packing: Packing, wanted: Tensor | None = None, recompute: Recompute = "none"
    ) -> tuple[Tensor, Tensor]:
        """Two tensors [T, D] whose sum is the result, of two whose sum goes in; the first layer gets one alone.

        With `wanted`, int64 [M], [M, D]: all that comes after keys and values is of those rows only.
        """
        return self._compute(self, x_TD, residual_TD, packing, wanted, recompute)

    def norm_input(self, x_TD: Tensor, residual_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of `x + residual`, and that sum, each [T, D]."""
        return self.input_layernorm(x_TD, residual_TD)

    def transform(self, normed_TD: Tensor, summed_TD: Tensor, packing: Packing, wanted: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute what `forward` gives, of the two [T, D] that `norm_input` gives, with nothing computed again in backward."""
        attended = self.self_attn(normed_TD, packing, wanted)
        residual = summed_TD if wanted is None else summed_TD.index_select(0, wanted)
        normed, summed = self.post_attention_layernorm(attended, residual)
        return self.mlp(normed, packing.keys_of(wanted)), summed

    def kept_products(self, recompute: Recompute, wanted: Tensor | None) -> int:
        """How many of the products of `transform` are kept for backward: q, k, v, o; with "norms" gate and up too."""
        return 6 if recompute == "norms" else 4


class Decoder(nn.Module):
    """Embedding, layers, which share one graph, and final norm: transformers' `model.`."""

    def __init__(self, config: LlamaConfig, ops: Ops, linears: Linears, graph: Graph) -> None:
        super().__init__()
        compute = graph(compute_layer)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, ops, linears.of_layer(i), compute) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)


class Llama(nn.Module):
    """The language model; parameter names are transformers' own (`model.layers.0...`, `lm_head.weight`).

    `linears` builds the linear layers of its blocks; `graph` is what becomes of the function that computes a block.
    """

    HOME = "model"
    """What all parameters but the head's lie in."""

    def __init__(self, config: LlamaConfig, ops: Ops, linears: Linears = PLAIN, graph: Graph = eager) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, ops, linears, graph)
        # No submodules a second time: they lie in `model`.
        self._adapted = tuple(module for module in self.modules() if isinstance(module, LoraLinear))
        self.lm_head = None if config.tied else Linear(config.hidden_size, config.vocab_size, bias=False)
        # No buffer: it stays fp32 whatever dtype the module is cast to, and moves to the device once.
        self._frequencies = config.inverse_frequencies()

    @property
    def embedding_weight(self) -> Tensor:
        """[V, D], in the dtype it is kept in."""
        return self.model.embed_tokens.weight

    @property
    def head_weight(self) -> Tensor:
        """[V, D], in the dtype it is kept in."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def layers(self) -> nn.ModuleList:
        """The layers, in their order."""
        return self.model.layers

    def place_constants(self, device: torch.device) -> None:
        """Move what is no parameter to `device`: before a graph is compiled, as it would hold the move."""
        if self._frequencies.device != device:
            self._frequencies = self._frequencies.to(device)
            for layer in self._adapted:
                layer.number = layer.number.to(device)

    def forward(
        self,
        x_TD: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        recompute: Recompute = "none",
        wanted: Tensor | None = None,
        row_keys: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [T, D] after the final norm, of the spliced input [T, D], in its dtype.

        `wanted`, int64 [M], each row once: [M, D] of these rows only, for which the last layer does no other row's work.
        `row_keys`, int64 [T]: what the dropout of adapters is drawn by; without them nothing is dropped.
        Without gradients there is nothing to `recompute`.
        """
        self.place_constants(x_TD.device)
        angles = position_ids.float().unsqueeze(1) * self._frequencies
        angles = torch.cat((angles, angles), dim=-1)
        packing = Packing(angles.cos().to(x_TD.dtype), angles.sin().to(x_TD.dtype), cu_seqlens, max_seqlen, row_keys)
        return self.model.norm(run_layers(self.layers, x_TD, packing, recompute, wanted))
