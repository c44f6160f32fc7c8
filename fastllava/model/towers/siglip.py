"""SigLIP's vision tower (Zhai et al. 2023, arXiv 2303.15343), and SigLIP2's of a fixed size (Tschannen et al. 2025, arXiv 2502.14786).

No class row, and a whole picture squeezed into the square. The head that pools the rows into one is not read: no projector sees it.
"""

from dataclasses import dataclass

from fastllava.model.towers.vit import TowerConfig


@dataclass(frozen=True)
class SiglipConfig(TowerConfig):
    """A SigLIP vision config.json; defaults are transformers' SiglipVisionConfig's."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6

    NAME = "SigLIP"
    MODEL_TYPE = "siglip_vision_model"
    WHOLE = "siglip"
    CLASS_ROWS = 0
    PATCH_BIAS = True
    PRE_NORM = False
    ACTIVATIONS = ("gelu_pytorch_tanh", "gelu")
    MEAN = (0.5, 0.5, 0.5)
    STD = (0.5, 0.5, 0.5)
    CROPS = False
