"""Models by size, such as "7b": the config.json fields of decoder and tower, for plans and benches that have no folders of weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastllava.batch import ImageSpec
from fastllava.errors import UserError
from fastllava.model.decoders import DecoderConfig
from fastllava.model.towers import TowerConfig
from fastllava.model.weights import Origin
from fastllava.model.weights.configs import decoder_config
from fastllava.model.weights.tower_configs import image_spec, tower_config
from fastllava_kernels.llava15 import BATCHES, DECODERS, Decoder, MicroBatch

PROJECTOR = "mlp2x_gelu"
SELECT_LAYER = -2
"""The tower's hidden state that the projector reads, as in LLaVA-1.5."""


def _llama(decoder: Decoder, layers: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": decoder.width,
        "intermediate_size": decoder.inner,
        "num_hidden_layers": layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.key_heads,
        "vocab_size": decoder.vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }


def _clip(width: int, inner: int, layers: int, heads: int, side: int, patch: int) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": side,
        "patch_size": patch,
        "hidden_act": "quick_gelu",
    }


def _clip_l(batch: MicroBatch) -> dict[str, Any]:
    """CLIP-L/14 for 336 pixels."""
    return _clip(batch.tower_width, batch.tower_inner, 24, batch.tower_heads, 336, 14)


@dataclass(frozen=True)
class Size:
    """The fields of both config.json files."""

    text: Mapping[str, Any]
    vision: Mapping[str, Any]

    @property
    def llm(self) -> DecoderConfig:
        """The decoder's configuration."""
        return decoder_config(self.text, "sizes")

    @property
    def tower(self) -> TowerConfig:
        """The tower's configuration."""
        return tower_config(self.vision, "sizes")

    @property
    def spec(self) -> ImageSpec:
        """How the tower wants its images."""
        return image_spec(self.tower, {}, "sizes")

    @property
    def origin(self) -> Origin:
        """What a folder with these config.json files would say."""
        described = {"llm": self.llm, "tower": self.tower, "spec": self.spec, "text": self.text, "vision": self.vision}
        chosen = {"select_layer": SELECT_LAYER, "projector_type": PROJECTOR, "layout": "llm"}
        absent = dict.fromkeys(("tower_folder", "mm_vision_tower", "image_token"))
        return Origin(**described, **chosen, **absent, generation={}, preprocessor={})  # pyright: ignore[reportArgumentType]

    def with_layers(self, layers: int | None) -> "Size":
        """This size with fewer decoder layers; None keeps all. Raises UserError where it has not so many."""
        if layers is None:
            return self
        if not 1 <= layers <= self.text["num_hidden_layers"]:
            raise UserError(f"--layers: {layers}, but the decoder has {self.text['num_hidden_layers']}; write 1 to that")
        return replace(self, text={**self.text, "num_hidden_layers": layers})


SIZES: Mapping[str, Size] = {
    "7b": Size(_llama(DECODERS["7b"], 32), _clip_l(BATCHES["7b"])),
    "13b": Size(_llama(DECODERS["13b"], 40), _clip_l(BATCHES["13b"])),
    "1.1b": Size(_llama(DECODERS["1.1b"], 22), _clip_l(BATCHES["1.1b"])),
    # For a CPU: 148 million parameters, and a tower as deep as CLIP-L of few FLOPs that gives as many patches.
    "150m": Size(_llama(Decoder(768, 2048, 12, 12, 64, 32000), 14), _clip(128, 512, 24, 2, 336, 14)),
    "tiny": Size(_llama(DECODERS["tiny"], 2), _clip(32, 64, 3, 2, 24, 4)),
}


def size_named(name: str, option: str = "--size") -> Size:
    """Look a size up. Raises UserError for one that is not there."""
    if name not in SIZES:
        raise UserError(f"{option}: '{name}' is none of {', '.join(SIZES)}")
    return SIZES[name]


def write_configs(name: str, folder: Path) -> list[str]:
    """Write the config.json files of a size under `folder`; the `key=value` words that make a run of them. Raises as `size_named`."""
    size = size_named(name, "--size")
    words = []
    for key, fields in (("llm", size.text), ("vision_tower", size.vision)):
        place = folder / key
        place.mkdir()
        (place / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        words.append(f"model.{key}={json.dumps(str(place))}")
    return words
