"""The decoder: MPT (ALiBi in place of positions, norms without bias, a fused Wqkv that may be clipped, exact GELU) on packed samples.

Shape letters: T packed rows, M rows whose result is wanted, D width, H heads, K head width, E columns for ALiBi, V vocabulary.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllava.config import Recompute
from fastllava.errors import UserError
from fastllava.model.alibi import COLUMNS, LONGEST, columns_of_keys, columns_of_queries, slopes
from fastllava.model.compiled import Graph, eager
from fastllava.model.fields import positive
from fastllava.model.layers import Embedding, LayerNorm, Linear
from fastllava.model.ops import Ops
from fastllava.model.products import Product, linear
from fastllava.model.recompute import compute_layer, run_layers

# What transformers computes, whatever config.json says under these names, which are its own and llm-foundry's; so with another value an
# export, an answer or a certificate would be of another model.
_COMPUTED: Mapping[str, tuple[Any, ...]] = {
    "expansion_ratio": (4,),
    "no_bias": (True,),
    "logit_scale": (None,),
    "embedding_fraction": (1.0,),
    "resid_pdrop": (0,),
    "emb_pdrop": (0,),
    "resid_prob_drop": (0,),
    "emb_prob_drop": (0,),
    "norm_type": ("low_precision_layernorm", "layernorm"),
    "ffn_config.ffn_type": ("mptmlp",),
    "ffn_config.ffn_act_fn": ({"name": "gelu", "approximate": "none"}, {"name": "gelu"}),
    "attn_config.alibi": (True,),
    "attn_config.alibi_bias_max": (8,),
    "attn_config.attn_type": ("multihead_attention",),
    "attn_config.attn_pdrop": (0,),
    "attn_config.qk_ln": (False,),
    "attn_config.qk_gn": (False,),
    "attn_config.prefix_lm": (False,),
    "attn_config.attn_uses_sequence_id": (False,),
    "attn_config.rope": (False,),
    "attn_config.sliding_window_size": (-1,),
}
# The names that MptConfig of transformers takes too, and writes as those on the right.
_ALIASES = {"hidden_size": "d_model", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"}
# What transformers fills in where a config.json is silent.
_DEFAULTS = {"d_model": 2048, "n_heads": 16, "n_layers": 24, "vocab_size": 50368, "layer_norm_epsilon": 1e-5}


@dataclass(frozen=True)
class MptConfig:
    """The fields of an MPT's config.json that decide the computation."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_epsilon: float
    clip_qkv: float | None
    """Queries, keys and values are clipped to this on both sides."""
    softmax_scale: float
    tied: bool
    """The head is the embedding."""

    @classmethod
    def read(cls, config: Mapping[str, Any], where: str) -> "MptConfig":
        """Read config.json, as transformers does. Raises UserError, which begins with `where`, for what is not supported."""
        given = {**_DEFAULTS, **{_ALIASES.get(name, name): value for name, value in config.items() if value is not None}}
        sections = {"": given, **{name: given.get(name) or {} for name in ("attn_config", "ffn_config")}}
        for name, section in sections.items():
            if not isinstance(section, Mapping):
                raise UserError(f"{where}: {name} is {json.dumps(section)}; an object is needed")
        for key, computed in _COMPUTED.items():
            section, _, name = key.rpartition(".")
            value = sections[section].get(name)
            if value is not None and value not in computed:
                needed = " or ".join(map(json.dumps, computed))
                raise UserError(f"{where}: {key} {json.dumps(value)} is not supported; give an MPT with {needed}")
        attention = sections["attn_config"]
        if given.get("quantization_config"):
            raise UserError(f"{where}: its weights are quantised; give the model in fp16, bf16 or fp32")
        width, heads = (positive(given, name, where, int) for name in ("d_model", "n_heads"))
        if width % heads:
            raise UserError(f"{where}: n_heads {heads} does not divide d_model {width}")
        if attention.get("kv_n_heads") not in (None, heads):
            raise UserError(f"{where}: attn_config.kv_n_heads {attention['kv_n_heads']!r} is not supported; give an MPT with {heads}")
        scale = attention.get("softmax_scale")
        number = lambda name: float(positive(attention, name, f"{where}: attn_config", float))  # noqa: E731
        return cls(
            vocab_size=positive(given, "vocab_size", where, int),
            hidden_size=width,
            num_hidden_layers=positive(given, "n_layers", where, int),
            num_attention_heads=heads,
            layer_norm_epsilon=positive(given, "layer_norm_epsilon", where, float),
            # 0 is none, as in transformers.
            clip_qkv=number("clip_qkv") if attention.get("clip_qkv") else None,
            softmax_scale=(width / heads) ** -0.5 if scale is None else number("softmax_scale"),
            tied=bool(given.get("tie_word_embeddings", True)),
        )

    def fields(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of this decoder that came with the fields `given`: all that decides the computation is spelled out."""
        attention = {**(given.get("attn_config") or {}), "alibi": True, "alibi_bias_max": 8, "attn_pdrop": 0}
        attention |= {"clip_qkv": self.clip_qkv, "softmax_scale": self.softmax_scale}
        return {
            **{name: value for name, value in given.items() if name not in _ALIASES},
            **{of_mpt: getattr(self, name) for name, of_mpt in _ALIASES.items()},
            "vocab_size": self.vocab_size,
            "expansion_ratio": 4,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "no_bias": True,
            "attn_config": attention,
        }

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP."""
        return 4 * self.hidden_size

    @property
    def num_key_value_heads(self) -> int:
        """As many as of queries."""
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """K."""
        return self.hidden_size // self.num_attention_heads

    @property
    def attention_width(self) -> int:
        """Columns of a head that attention gets: K + E."""
        return self.head_dim + COLUMNS

    @property
    def window(self) -> int:
        """Rows of the longest sample."""
        return LONGEST

    def products(self) -> dict[str, int]:
        """Weights of each product of a layer, in their order; q, k and v are one product."""
        square = self.hidden_size**2
        return {"q": square, "k": square, "v": square, "o": square, "up": 4 * square, "down": 4 * square}


@dataclass(frozen=True)
class Packing:
    """What every block needs to know about the packed rows."""

    columns_HE: Tensor
    """What a head's queries have beside their own columns, in the compute dtype."""
    columns_TE: Tensor
    """What a row's keys have beside theirs, in the compute dtype."""
    cu_seqlens: Tensor
    """int32 [S+1]."""
    max_seqlen: int


class Attention(nn.Module):
    """Causal attention inside each sample, with ALiBi.

    The room divides scores by the root of the width that it sees, so queries are multiplied by that and by the scale wanted: in bf16 one
    rounding more of a query, where transformers rounds each score.

    With `wanted`, int64 [M], queries and results are of those rows only; the others' are zeros, which nobody reads, as in
    `fastllava.model.llama`.
    """

    def __init__(self, config: MptConfig, ops: Ops, product: Product) -> None:
        super().__init__()
        self.config, self.ops = config, ops.only("attention")
        self.Wqkv = Linear(config.hidden_size, 3 * config.hidden_size, False, product)
        self.out_proj = Linear(config.hidden_size, config.hidden_size, False, product)
        self._scale = config.softmax_scale * math.sqrt(config.attention_width)

    def forward(self, x_TD: Tensor, packing: Packing, wanted: Tensor | None = None) -> Tensor:
        """[T, D], or [M, D] of the wanted rows."""
        heads, width = self.config.num_attention_heads, self.config.hidden_size
        q, kv = self._projected(x_TD, wanted, [width, 2 * width])
        if self.config.clip_qkv is not None:
            q, kv = (each.clamp(-self.config.clip_qkv, self.config.clip_qkv) for each in (q, kv))
        q, k, v = (each.unflatten(-1, (heads, -1)) for each in (q, *kv.split(width, -1)))
        q = torch.cat((q * self._scale, packing.columns_HE.expand(q.shape[0], -1, -1)), dim=-1)
        k = torch.cat((k, packing.columns_TE.unsqueeze(1).expand(-1, heads, -1)), dim=-1)
        if wanted is not None:
            q = q.new_zeros(k.shape).index_copy(0, wanted, q)
        out = self.ops.attention(q, k, F.pad(v, (0, COLUMNS)), packing.cu_seqlens, packing.max_seqlen, True)
        if wanted is not None:
            out = out.index_select(0, wanted)
        return self.out_proj(out[..., : self.config.head_dim].flatten(1))

    def _projected(self, x_TD: Tensor, wanted: Tensor | None, widths: list[int]) -> tuple[Tensor, Tensor]:
        """Queries, of the wanted rows, and keys with values, of all."""
        if wanted is None:
            q, kv = self.Wqkv(x_TD).split(widths, -1)
            return q, kv
        of_q, of_kv = self.Wqkv.weight.split(widths)
        return self.Wqkv.product(x_TD.index_select(0, wanted), of_q, None), self.Wqkv.product(x_TD, of_kv, None)


class MLP(nn.Module):
    """`down(gelu(up(x)))`."""

    def __init__(self, config: MptConfig, product: Product) -> None:
        super().__init__()
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, False, product)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, False, product)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x_TD)))


class Block(nn.Module):
    """Pre-norm attention and MLP, computed by `compute`: `compute_layer`, or a graph of it."""

    def __init__(self, config: MptConfig, ops: Ops, product: Product, compute: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        norm = lambda: LayerNorm(config.hidden_size, config.layer_norm_epsilon, ops, bias=False)  # noqa: E731
        self.norm_1, self.norm_2 = norm(), norm()
        self.attn = Attention(config, ops, product)
        self.ffn = MLP(config, product)
        self.sums_in_norm = False
        self._compute = compute

    def forward(
        self, x_TD: Tensor, residual_TD: Tensor | None, packing: Packing, wanted: Tensor | None = None, recompute: Recompute = "none"
    ) -> tuple[Tensor, Tensor]:
        """Two tensors [T, D], or [M, D] of the rows `wanted`, whose sum is the result, as `fastllava.model.llama.DecoderLayer`."""
        return self._compute(self, x_TD, residual_TD, packing, wanted, recompute)

    def norm_input(self, x_TD: Tensor, residual_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of `x + residual`, and that sum, each [T, D]."""
        summed = x_TD if residual_TD is None else x_TD + residual_TD
        return self.norm_1(summed), summed

    def transform(self, normed_TD: Tensor, summed_TD: Tensor, packing: Packing, wanted: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute what `forward` gives, of the two [T, D] that `norm_input` gives, with nothing computed again in backward."""
        attended = self.attn(normed_TD, packing, wanted)
        summed = attended + (summed_TD if wanted is None else summed_TD.index_select(0, wanted))
        return self.ffn(self.norm_2(summed)), summed

    def kept_products(self, recompute: Recompute, wanted: Tensor | None) -> int:
        """How many of the products of `transform` are kept for backward: attention's, which are three where queries are apart, and `up`."""
        return (2 if wanted is None else 3) + (recompute == "norms")


class Transformer(nn.Module):
    """Embedding, blocks, which share one graph, and final norm: transformers' `transformer.`."""

    def __init__(self, config: MptConfig, ops: Ops, product: Product, graph: Graph) -> None:
        super().__init__()
        compute = graph(compute_layer)
        self.wte = Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, ops, product, compute) for _ in range(config.num_hidden_layers))
        self.norm_f = LayerNorm(config.hidden_size, config.layer_norm_epsilon, ops, bias=False)


class Mpt(nn.Module):
    """The language model; parameter names are transformers' own (`transformer.blocks.0...`).

    `product` computes the linear layers of its blocks; `graph` is what becomes of the function that computes a block.
    """

    HOME = "transformer"
    """What all parameters but the head's lie in."""

    def __init__(self, config: MptConfig, ops: Ops, product: Product = linear, graph: Graph = eager) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, ops, product, graph)
        self.lm_head = None if config.tied else Linear(config.hidden_size, config.vocab_size, bias=False)
        # No buffer: it stays fp64 whatever dtype the module is cast to, and moves to the device once.
        self._scaled_slopes = slopes(config.num_attention_heads).double() * math.sqrt(config.attention_width)

    @property
    def embedding_weight(self) -> Tensor:
        """[V, D], in the dtype it is kept in."""
        return self.transformer.wte.weight

    @property
    def head_weight(self) -> Tensor:
        """[V, D], in the dtype it is kept in."""
        return self.transformer.wte.weight if self.lm_head is None else self.lm_head.weight

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, in their order."""
        return self.transformer.blocks

    def place_constants(self, device: torch.device) -> None:
        """Move what is no parameter to `device`: before a graph is compiled, as it would hold the move."""
        if self._scaled_slopes.device != device:
            self._scaled_slopes = self._scaled_slopes.to(device)

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
        """Hidden states after the final norm, of the spliced input [T, D]; as `Llama.forward`, and nothing is ever dropped."""
        self.place_constants(x_TD.device)
        columns_HE, columns_TE = columns_of_queries(self._scaled_slopes, x_TD.dtype), columns_of_keys(position_ids, x_TD.dtype)
        packing = Packing(columns_HE, columns_TE, cu_seqlens, max_seqlen)
        return self.transformer.norm_f(run_layers(self.layers, x_TD, packing, recompute, wanted))
