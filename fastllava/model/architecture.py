"""What decides a LLaVA's computation and the shapes of its weights, apart from the weights themselves."""

from dataclasses import dataclass

from fastllava.batch import ImageSpec
from fastllava.config import LoraConfig, Quantize
from fastllava.model.decoders import DecoderConfig
from fastllava.model.towers import TowerConfig


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder, a tower, and the projector between them."""

    llm: DecoderConfig
    tower: TowerConfig
    select_layer: int
    """The tower's hidden state that feeds the projector, as transformers counts them; -2 for LLaVA-1.5."""
    projector_type: str
    spec: ImageSpec
    lora: LoraConfig | None = None
    """The adapters of the decoder; None for none."""
    quantize: Quantize | None = None
    """How the weights of the decoder's layers are kept; None for as they are."""
