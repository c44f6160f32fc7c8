"""The families of decoders that compute differently: a module for each, and what builds one from its configuration."""

from fastllava.errors import UserError
from fastllava.model.compiled import Graph, eager
from fastllava.model.linears import PLAIN, Linears
from fastllava.model.llama import Llama, LlamaConfig
from fastllava.model.mpt import Mpt, MptConfig
from fastllava.model.ops import Ops

Decoder = Llama | Mpt
DecoderConfig = LlamaConfig | MptConfig


def build_decoder(config: DecoderConfig, ops: Ops, linears: Linears = PLAIN, graph: Graph = eager) -> Decoder:
    """Build the decoder that `config` describes, on the current default device. Raises UserError for adapters that it cannot have."""
    if isinstance(config, MptConfig):
        if linears.lora is not None:
            raise UserError("lora.rank: model.llm is an MPT, which gets no adapters here; leave the section lora out, or give a Llama")
        return Mpt(config, ops, linears.product, graph)
    return Llama(config, ops, linears, graph)
