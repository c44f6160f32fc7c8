"""The JSON beside the weights of a checkpoint: config.json, generation_config.json, and llava-hf's processor files."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllava.batch import ImageSpec
from fastllava.config import ModelConfig
from fastllava.model.llama import Llama3Rope
from fastllava.model.llava import Llava
from fastllava.model.mpt import MptConfig
from fastllava.model.weights.configs import FAMILIES, family_of
from fastllava.model.weights.read import Origin
from fastllava.model.weights.tokenizer_files import WrittenTokenizer
from fastllava.model.weights.tower_configs import RESAMPLE

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Fields of a LLaVA or of a loader, which say nothing about the decoder.
_NOT_TEXT = ("_name_or_path", "architectures", "dtype", "torch_dtype", "rope_parameters", "image_aspect_ratio", "use_mm_proj")
_HUBS = ("openai/", "laion/")
"""Where the original's builder fetches a tower from that is no folder (llava/model/multimodal_encoder/builder.py)."""
_NOT_TEXT_PREFIXES = ("mm_", "tune_", "freeze_", "unfreeze_", "tokenizer_", "image_grid")


_TEXT = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
)
_CLASSES = {"clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel"}
"""transformers' class of a tower, by its model_type."""
_NOT_VISION = ("architectures", "_name_or_path", "dtype", "torch_dtype", "transformers_version")


@dataclass(frozen=True)
class Vocabulary:
    """The rows of embedding and head on disk."""

    kept: int
    """The model's first rows, written as they are."""
    rows: int
    """Rows written; those beyond are each the mean of the rows kept."""

    def fit(self, table: Tensor) -> Tensor:
        """[rows, D] of a table [V, D]. The mean is what the original gives new tokens (llava_arch.py, initialize_vision_tokenizer)."""
        table = table[: self.kept]
        if self.rows == self.kept:
            return table
        return torch.cat((table, table.float().mean(0, keepdim=True).to(table.dtype).expand(self.rows - self.kept, -1)))


def vocabulary_of(model: Llava, layout: str, tokenizer: WrittenTokenizer | None) -> Vocabulary:
    """How many rows `layout` writes.

    llava-hf has rows for the image and the pad token and is padded to a multiple of 64; the original has neither.
    """
    vocab = model.llm.config.vocab_size
    if layout == "llava" or tokenizer is None:
        return Vocabulary(vocab, vocab)
    needed = max(vocab, tokenizer.image + 1, tokenizer.pad + 1)
    return Vocabulary(vocab, vocab if needed == vocab else -(-needed // 64) * 64)


def config_files(
    model: Llava,
    layout: str,
    dtype: torch.dtype,
    *,
    source: ModelConfig,
    vocabulary: Vocabulary,
    image_policy: str,
    max_tokens: int,
    tokenizer: WrittenTokenizer | None,
    home: Path,
    report: Callable[[str], object],
) -> dict[str, Mapping[str, Any]]:
    """JSON by file name. `home` is the folder that the checkpoint will lie in."""
    text = text_config(model) | {"vocab_size": vocabulary.rows}
    if isinstance(model.llm.config, MptConfig):
        # transformers makes biases for as many rows; a training may have had more.
        text["max_seq_len"] = max(int(text.get("max_seq_len") or 2048), max_tokens)
    name = str(dtype).removeprefix("torch.")
    generation = _generation_config(model.origin, text, report)
    if layout == "llava":
        return {
            "config.json": _original_config(model, text, source, image_policy, max_tokens, home) | {"torch_dtype": name},
            "generation_config.json": generation,
        }
    pad = {"pad_token_id": tokenizer.pad} if tokenizer else {}
    return {
        "config.json": _hf_config(model, text | {"torch_dtype": name}, tokenizer)
        | {"torch_dtype": name, "unpadded_vocab_size": vocabulary.kept}
        | pad,
        "generation_config.json": generation | pad,
        "preprocessor_config.json": _preprocessor(model, image_policy),
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "patch_size": model.origin.tower.patch_size,
            "num_additional_image_tokens": model.origin.tower.CLASS_ROWS,
            "vision_feature_select_strategy": _selected(model.origin),
        },
    }


def tower_config(model: Llava) -> dict[str, Any]:
    """config.json of the tower alone."""
    origin = model.origin
    tower = origin.tower
    # The head that pools SigLIP's rows is not part of the model.
    headless = {} if tower.CLASS_ROWS else {"vision_use_head": False}
    return {**origin.vision, **asdict(tower), **headless, "architectures": [_CLASSES[tower.MODEL_TYPE]], "model_type": tower.MODEL_TYPE}


def text_config(model: Llava) -> dict[str, Any]:
    """The decoder's config.json: what it came with, and every field that decides the computation spelled out."""
    llm, given = model.llm.config, model.origin.text
    text = {k: v for k, v in given.items() if k not in _NOT_TEXT and not k.startswith(_NOT_TEXT_PREFIXES)}
    said = {"model_type": family_of(given, "model.llm"), "tie_word_embeddings": llm.tied}
    if isinstance(llm, MptConfig):
        return {**llm.fields(text), **said}
    text |= {name: getattr(llm, name) for name in _TEXT}
    if "head_dim" in text or llm.head_dim != llm.hidden_size // llm.num_attention_heads:
        text["head_dim"] = llm.head_dim
    # transformers 4's spelling, which 5 reads too; the original's version knows "type" and no other key for linear.
    text["rope_scaling"] = llm.rope_scaling
    if isinstance(llm.rope_scaling, Llama3Rope):
        text["rope_scaling"] = {"rope_type": "llama3", **asdict(llm.rope_scaling)}
    elif llm.rope_scaling is not None:
        text["rope_scaling"] = {"type": "linear", "factor": llm.rope_scaling}
    return {**text, **said}


def projector_config(model: Llava, dtype: torch.dtype, source: ModelConfig, image_policy: str, max_tokens: int) -> dict[str, Any]:
    """config.json beside a projector alone: the original's loader reads it when the model of stage 1 is given with `--model-base`."""
    found = _original_config(model, text_config(model), source, image_policy, max_tokens, Path())
    return found | {"vocab_size": model.llm.config.vocab_size, "torch_dtype": str(dtype).removeprefix("torch.")}


def lora_config(
    model: Llava, dtype: torch.dtype, source: ModelConfig, image_policy: str, max_tokens: int, projector_lr: float | None
) -> dict[str, Any]:
    """config.json beside adapters, as the original's LoRA training writes it: of the base, and of tower and projector."""
    found = projector_config(model, dtype, source, image_policy, max_tokens)
    of_base = {"_name_or_path": str(source.llm), "architectures": model.origin.text.get("architectures") or found["architectures"]}
    return found | of_base | {"mm_projector_lr": projector_lr}


def _original_config(
    model: Llava, text: Mapping[str, Any], source: ModelConfig, image_policy: str, max_tokens: int, home: Path
) -> dict[str, Any]:
    origin: Origin = model.origin
    of_llava = origin.text if origin.layout == "llava" else {}
    family = FAMILIES[text["model_type"]]
    return {
        **{k: v for k, v in of_llava.items() if k not in ("dtype", "rope_parameters")},
        **text,
        "architectures": [family.architecture],
        "model_type": family.llava,
        "mm_vision_tower": _tower_name(origin, source, home),
        "mm_hidden_size": origin.tower.hidden_size,
        "mm_vision_select_layer": origin.select_layer,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": model.projector.projector_type,
        "mm_projector_lr": of_llava.get("mm_projector_lr"),
        "mm_patch_merge_type": "flat",
        "use_mm_proj": True,
        "image_aspect_ratio": image_policy,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": max_tokens,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
    }


def _tower_name(origin: Origin, source: ModelConfig, home: Path) -> str:
    """What the original's builder will look the tower up by: the name of a hub model where the folder ends in one, or that folder."""
    if source.vision_tower is not None:
        name = "/".join(source.vision_tower.parts[-2:])
        return name if name.startswith(_HUBS) else str(source.vision_tower.absolute())
    if origin.tower_folder is None:
        return str((home / "vision_tower").absolute())
    if origin.mm_vision_tower and origin.mm_vision_tower.startswith(_HUBS):
        return origin.mm_vision_tower
    return str(origin.tower_folder.absolute())


def _hf_config(model: Llava, text: Mapping[str, Any], tokenizer: WrittenTokenizer | None) -> dict[str, Any]:
    origin: Origin = model.origin
    vision = {k: v for k, v in tower_config(model).items() if k not in _NOT_VISION}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": tokenizer.image if tokenizer else origin.image_token,
        "image_seq_length": origin.spec.patches,
        "ignore_index": -100,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": origin.select_layer,
        "vision_feature_select_strategy": _selected(origin),
        "tie_word_embeddings": text["tie_word_embeddings"],
        "text_config": {k: v for k, v in text.items() if k != "transformers_version"},
        "vision_config": vision,
    }


def _selected(origin: Origin) -> str:
    """transformers' word for what the projector sees: all rows but the first, or all."""
    return "default" if origin.tower.CLASS_ROWS else "full"


def _generation_config(origin: Origin, text: Mapping[str, Any], report: Callable[[str], object]) -> dict[str, Any]:
    """The LLM's, without what transformers refuses to save: settings of sampling where sampling is off (Vicuna's has them)."""
    given = {k: v for k, v in origin.generation.items() if k != "_from_model_config"}
    for name in ("bos_token_id", "eos_token_id"):
        if text.get(name) is not None:
            given.setdefault(name, text[name])
    if given.get("do_sample"):
        return given
    dropped = [name for name in _SAMPLING if given.get(name) is not None]
    if dropped:
        report(f"generation_config.json: left out {', '.join(dropped)}, which do_sample=false contradicts")
    return {k: v for k, v in given.items() if k not in _SAMPLING}


def _preprocessor(model: Llava, image_policy: str) -> dict[str, Any]:
    spec, pads = model.spec, image_policy == "pad"
    square = {"height": spec.size, "width": spec.size}
    if spec.crops:
        resized = {"size": {"shortest_edge": spec.size}, "do_center_crop": True, "crop_size": square}
    else:
        resized = {"size": square, "do_center_crop": False}
    # SigLIP's own pads nothing.
    own = not spec.crops and not pads
    return {
        "image_processor_type": "SiglipImageProcessor" if own else "LlavaImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        **({} if own else {"do_pad": pads}),
        "do_resize": True,
        **resized,
        "resample": RESAMPLE[spec.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def tower_preprocessor(spec: ImageSpec) -> dict[str, Any]:
    """preprocessor_config.json beside a tower alone."""
    if spec.crops:
        resized = {"image_processor_type": "CLIPImageProcessor", "crop_size": spec.size, "size": {"shortest_edge": spec.size}}
    else:
        resized = {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": spec.size, "width": spec.size},
            "do_center_crop": False,
        }
    return {**resized, "resample": RESAMPLE[spec.resample], "image_mean": spec.mean, "image_std": spec.std}
