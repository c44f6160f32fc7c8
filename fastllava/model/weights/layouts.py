"""How each layout spells the names of tensors. Ours: `llm.`, `tower.`, `projector.` before the part's own names.

| part | ours | original LLaVA ("llava") | llava-hf on disk ("hf") |
|---|---|---|---|
| decoder | llm.model.layers... | model.layers... | language_model.model.layers... |
| head | llm.lm_head.weight | lm_head.weight | language_model.lm_head.weight |
| projector | projector... | model.mm_projector... | multi_modal_projector.linear_{1,2}..., of mlp2x_gelu alone |
| tower | tower.vision_model... | model.vision_tower.vision_tower.vision_model... | vision_tower.vision_model... |

Layout "module" is llava-hf's as transformers' own modules are named since 4.52, and PEFT names adapters: model.language_model.layers...,
model.multi_modal_projector.linear_{1,2}....
In an MPT `transformer` stands for `model`: llm.transformer.blocks..., in layout "llava" transformer.mm_projector...; it has no layout "hf".
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from fastllava.model.projectors import KINDS

Layout = Literal["llm", "llava", "hf"]


class _Part(NamedTuple):
    """One part of a checkpoint."""

    ours: str
    """How our names of its tensors begin."""
    written: str
    """How the names on disk begin."""
    read: str
    """A pattern of every beginning that files are known to have; the first part that matches wins."""


_HF_PROJECTORS = [
    (f"projector.{ours}", f"multi_modal_projector.{theirs}")
    for kind in KINDS.values()
    for names in kind.hf.values()
    for ours, theirs in names.items()
]
"""How names of projectors begin, ours and llava-hf's."""

# transformers 4.52 and later put `model.` before llava-hf's parts and take it from the decoder, 5.3 to 5.8 leave it in both
# places, 5.6 and later drop the tower's `vision_model.`; files saved by any of them are about. Of a whole CLIP or SigLIP the text half is
# of no use here. Whatever a trainer wrapped around a projector, base_model.model.model.mm_projector.0.weight is the same tensor.
_TABLES: Mapping[str, tuple[_Part, ...]] = {
    "llm": (
        _Part("llm.lm_head.", "lm_head.", r"lm_head\."),
        _Part("llm.", "", r"(?=(model|transformer)\.)"),
    ),
    "llava": (
        _Part("llm.lm_head.", "lm_head.", r"lm_head\."),
        _Part("projector.", "{home}.mm_projector.", r"(model|transformer)\.mm_projector\."),
        _Part(
            "tower.vision_model.",
            "{home}.vision_tower.vision_tower.vision_model.",
            r"(model|transformer)\.vision_tower\.vision_tower\.(vision_model\.)?",
        ),
        _Part("llm.", "", r"(?=(model|transformer)\.)"),
    ),
    "hf": (
        _Part("llm.lm_head.", "language_model.lm_head.", r"(model\.)?(language_model\.)?lm_head\."),
        _Part("llm.model.", "language_model.model.", r"(model\.language_model|language_model)\.(model\.)?"),
        *(_Part(ours, theirs, rf"(model\.)?{re.escape(theirs)}") for ours, theirs in _HF_PROJECTORS),
        _Part("tower.vision_model.", "vision_tower.vision_model.", r"(model\.)?vision_tower\.(vision_model\.)?"),
    ),
    "module": (
        _Part("llm.model.", "model.language_model.", r"model\.language_model\."),
        *(_Part(ours, f"model.{theirs}", rf"model\.{re.escape(theirs)}") for ours, theirs in _HF_PROJECTORS),
    ),
    "tower": (_Part("tower.vision_model.", "vision_model.", r"vision_model\.|(?=(embeddings|encoder|pre_layrnorm|post_layernorm)\.)"),),
    "projector": (
        *(_Part(ours, theirs, rf"(.*\.)?{re.escape(theirs)}") for ours, theirs in _HF_PROJECTORS),
        _Part("projector.", "{home}.mm_projector.", r"(.*\.)?mm_projector\."),
    ),
}
# Buffers that old files hold and that are computed, and the text half of a whole CLIP or SigLIP, and the head that
# pools the rows of a SigLIP into one.
_IGNORED = re.compile(
    r".*\.rotary_emb\.inv_freq|(.*\.)?embeddings\.position_ids|text_model\..*|(text|visual)_projection\.weight"
    r"|logit_(scale|bias)|(.*vision_tower\.)?(vision_model\.)?head\.(probe|attention\..*|layernorm\..*|mlp\..*)"
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
    """Our name of an on-disk name; None for one that this layout does not have. Layouts also: "tower", "projector"."""
    for part in _TABLES[layout]:
        match = re.match(part.read, name)
        if match:
            return part.ours + name[match.end() :]
    return None


def to_disk(name: str, layout: str, home: str = "model") -> str:
    """The on-disk name of our name; every one of ours has one in both layouts that are written, an MPT's in "llava" alone.

    `home`: what the decoder's parameters lie in (`HOME`), beside which the original puts tower and projector.
    """
    for part in _TABLES[layout]:
        if name.startswith(part.ours):
            return part.written.format(home=home) + name.removeprefix(part.ours)
    raise KeyError(f"{name} has no name in layout {layout}")
