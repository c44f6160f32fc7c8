"""CLIP's vision tower (Radford et al. 2021, arXiv 2103.00020): a class row first, and rows normalised before the first block."""

from dataclasses import dataclass

from fastllava.model.towers.vit import TowerConfig


@dataclass(frozen=True)
class ClipConfig(TowerConfig):
    """A CLIP vision config.json; defaults are transformers' CLIPVisionConfig's."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    NAME = "CLIP"
    MODEL_TYPE = "clip_vision_model"
    WHOLE = "clip"
    CLASS_ROWS = 1
    PATCH_BIAS = False
    PRE_NORM = True
    ACTIVATIONS = ("quick_gelu", "gelu")
    MEAN = (0.48145466, 0.4578275, 0.40821073)
    STD = (0.26862954, 0.26130258, 0.27577711)
    CROPS = True
