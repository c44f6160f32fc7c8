"""How each layout spells the names of tensors. Ours: `llm.`, `tower.`, `projector.` before the part's own names.

| part | ours | original LLaVA ("llava") | llava-hf on disk ("hf") |
|---|---|---|---|
| decoder | llm.model.layers... | model.layers... | language_model.model.layers... |
| head | llm.lm_head.weight | lm_head.weight | language_model.lm_head.weight |
| projector | projector.{0,2}... | model.mm_projector.{0,2}... | multi_modal_projector.linear_{1,2}... |
| tower | tower.vision_model... | model.vision_tower.vision_tower.vision_model... | vision_tower.vision_model... |
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

Layout = Literal["llm", "llava", "hf"]

# First match wins. transformers 4.52 and later put `model.` before llava-hf's parts and take it from the decoder, 5.6 and
# later drop CLIP's `vision_model.`, and files saved by any of them are about.
_READ: Mapping[str, tuple[tuple[str, str], ...]] = {
    "llm": ((r"lm_head\.", "llm.lm_head."), (r"model\.", "llm.model.")),
    "llava": (
        (r"lm_head\.", "llm.lm_head."),
        (r"model\.mm_projector\.", "projector."),
        (r"model\.vision_tower\.vision_tower\.(vision_model\.)?", "tower.vision_model."),
        (r"model\.", "llm.model."),
    ),
    "hf": (
        (r"(language_model\.)?lm_head\.", "llm.lm_head."),
        (r"(model\.language_model|language_model\.model|language_model)\.", "llm.model."),
        (r"(model\.)?multi_modal_projector\.linear_1\.", "projector.0."),
        (r"(model\.)?multi_modal_projector\.linear_2\.", "projector.2."),
        (r"(model\.)?vision_tower\.(vision_model\.)?", "tower.vision_model."),
    ),
    # A whole CLIP has a text half besides, of no use here.
    "clip": (
        (r"vision_model\.", "tower.vision_model."),
        (r"(?=(embeddings|encoder|pre_layrnorm|post_layernorm)\.)", "tower.vision_model."),
    ),
    # Whatever a trainer wrapped around it: base_model.model.model.mm_projector.0.weight is the same tensor.
    "projector": (
        (r"(.*\.)?mm_projector\.", "projector."),
        (r"(.*\.)?multi_modal_projector\.linear_1\.", "projector.0."),
        (r"(.*\.)?multi_modal_projector\.linear_2\.", "projector.2."),
    ),
}
_WRITE: Mapping[str, tuple[tuple[str, str], ...]] = {
    "llava": (
        ("llm.", ""),
        ("projector.", "model.mm_projector."),
        ("tower.", "model.vision_tower.vision_tower."),
    ),
    "hf": (
        ("llm.", "language_model."),
        ("projector.0.", "multi_modal_projector.linear_1."),
        ("projector.2.", "multi_modal_projector.linear_2."),
        ("tower.", "vision_tower."),
    ),
}
# Buffers that old files hold and that are computed, and the text half of a whole CLIP.
_IGNORED = re.compile(
    r".*\.rotary_emb\.inv_freq|(.*\.)?embeddings\.position_ids|text_model\..*|(text|visual)_projection\.weight|logit_scale"
)


def layout_of(config: Mapping[str, Any]) -> Layout:
    """Which layout the folder of this config.json is in; by its fields alone, never by a name."""
    if config.get("model_type") == "llava" and ("text_config" in config or "vision_config" in config):
        return "hf"
    if "mm_vision_tower" in config or "mm_projector_type" in config or str(config.get("model_type")).startswith("llava"):
        return "llava"
    return "llm"


def ignored(name: str) -> bool:
    """Whether a tensor on disk is none of the model's parameters, and known to be."""
    return _IGNORED.fullmatch(name) is not None


def to_ours(name: str, layout: str) -> str | None:
    """Our name of an on-disk name; None for one that this layout does not have. Layouts also: "clip", "projector"."""
    for pattern, prefix in _READ[layout]:
        match = re.match(pattern, name)
        if match:
            return prefix + name[match.end() :]
    return None


def to_disk(name: str, layout: str) -> str:
    """The on-disk name of our name; every one of ours has one in both layouts that are written."""
    for ours, theirs in _WRITE[layout]:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise KeyError(f"{name} has no name in layout {layout}")
