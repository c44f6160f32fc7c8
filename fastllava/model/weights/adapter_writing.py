"""Adapters written as folders that others load: the original's four files, or PEFT's two for a model of llava-hf.

adapter_config.json has the fields of PEFT 0.4, which every version to 0.21 takes; the later ones stand at their defaults.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastllava.config import TARGETS, LoraConfig, ModelConfig
from fastllava.model.llava import Llava
from fastllava.model.lora import is_adapter
from fastllava.model.weights.adapter_config import ADAPTER_CONFIG
from fastllava.model.weights.adapters import ADAPTER_WEIGHTS, PROJECTOR_FILES
from fastllava.model.weights.beside import beside_its_place, names_below, on_cpu
from fastllava.model.weights.config_files import lora_config
from fastllava.model.weights.files import dump_json
from fastllava.model.weights.layouts import to_disk

_PEFT = "base_model.model."


def write_adapter(
    folder: Path,
    layout: Literal["llava", "hf"],
    lora: LoraConfig,
    state: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    base: str,
    config: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write the adapters of `state`, and the projector where it holds one, in `dtype`; the names of the files. Raises OSError.

    layout: "llava", what the original's LoRA training leaves, with `config` as config.json; or "hf", what PEFT puts on a
    LlavaForConditionalGeneration, the projector through `modules_to_save`. `state` is by our names; `base` names the model that
    the adapters lie on.
    """
    of_layout = {"llava": "llava", "hf": "module"}[layout]
    tensors = {name: on_cpu(tensor, dtype) for name, tensor in state.items() if is_adapter(name) or name.startswith("projector.")}
    on_disk = {_PEFT + to_disk(name, of_layout): tensor for name, tensor in tensors.items()}
    projector = [_PEFT + to_disk(name, of_layout) for name in tensors if name.startswith("projector.")]
    with beside_its_place(folder, sum(tensor.nbytes for tensor in tensors.values())) as beside:
        if layout == "llava":
            torch.save({name: on_disk.pop(name) for name in projector}, beside / PROJECTOR_FILES[0])
        save_file(on_disk, beside / ADAPTER_WEIGHTS[0], metadata={"format": "pt"})
        dump_json(_adapter_config(layout, lora, base, bool(projector)), beside / ADAPTER_CONFIG)
        if config is not None:
            dump_json(config, beside / "config.json")
        return names_below(beside)


def write_lora(
    model: Llava,
    folder: Path,
    dtype: torch.dtype,
    *,
    source: ModelConfig,
    image_policy: str,
    max_tokens: int,
    projector_lr: float | None,
    state: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """What the original's LoRA training leaves, of a model with adapters, in `folder`: four files, in `dtype`; their names.

    `source` is where the model was read from, image_policy, max_tokens and projector_lr are those of training; `state` stands for the
    model's own state where that is sharded. Raises OSError.
    """
    lora = model.origin.lora
    if lora is None:
        raise ValueError("a model without adapters")
    config = lora_config(model, dtype, source, image_policy, max_tokens, projector_lr)
    state = model.state_dict() if state is None else state
    return write_adapter(folder, "llava", lora, state, dtype, base=str(source.llm), config=config)


def peft_targets(targets: Sequence[str]) -> str:
    """PEFT's `target_modules` for these linear layers of llava-hf's decoder; by their names alone it would find the tower's too."""
    return rf".*language_model.*\.({'|'.join(targets)})"


def _adapter_config(layout: str, lora: LoraConfig, base: str, with_projector: bool) -> dict[str, Any]:
    rank = lora.rank or 0
    alpha = lora.scale * rank
    wanted = [target for target in TARGETS if target in lora.targets]
    targets, saved = wanted, None
    if layout == "hf":
        targets = peft_targets(wanted)
        saved = [to_disk("projector.0.", "hf").split(".")[0]] if with_projector else None
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": saved,
        "peft_type": "LORA",
        "r": rank,
        "revision": None,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }
