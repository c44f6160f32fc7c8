"""The families of decoders that compute differently: a module for each, and what builds one from its configuration."""

from fastllava.model.compiled import Graph, eager
from fastllava.model.llama import Llama, LlamaConfig
from fastllava.model.mpt import Mpt, MptConfig
from fastllava.model.ops import Ops
from fastllava.model.products import Product, linear

Decoder = Llama | Mpt
DecoderConfig = LlamaConfig | MptConfig


def build_decoder(config: DecoderConfig, ops: Ops, product: Product = linear, graph: Graph = eager) -> Decoder:
    """Build the decoder that `config` describes, on the current default device."""
    if isinstance(config, MptConfig):
        return Mpt(config, ops, product, graph)
    return Llama(config, ops, product, graph)
