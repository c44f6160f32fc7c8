"""Models of the sizes that are measured, with random weights: ours, and the same weights in modules of transformers."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastllava.batch import ImageSpec
from fastllava.errors import UserError
from fastllava.model.architecture import Architecture
from fastllava.model.build import build_llava
from fastllava.model.clip import ClipConfig
from fastllava.model.execution import Execution
from fastllava.model.layers import set_parameter
from fastllava.model.llama import LlamaConfig
from fastllava.model.llava import Llava
from fastllava.model.twin import filled
from fastllava.model.weights.configs import clip_config, image_spec, llama_config

SELECT_LAYER = -2
PROJECTOR = "mlp2x_gelu"
STD = 0.02
"""Of random weights."""

Fields = Mapping[str, Any]
Tensors = Mapping[str, Tensor]


def _llama(width: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int = 32000) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
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


CLIP_L = _clip(1024, 4096, 24, 16, 336, 14)


@dataclass(frozen=True)
class Size:
    """The fields of both config.json files."""

    text: Fields
    vision: Fields

    @property
    def llama(self) -> LlamaConfig:
        """Of the decoder."""
        return llama_config(self.text, "bench")

    @property
    def clip(self) -> ClipConfig:
        """Of the tower."""
        return clip_config(self.vision, "bench")

    @property
    def spec(self) -> ImageSpec:
        """What the tower wants to see."""
        return image_spec(self.clip, {}, "bench")

    @property
    def architecture(self) -> Architecture:
        """Its decoder and tower with LLaVA-1.5's projector."""
        return Architecture(llama=self.llama, clip=self.clip, select_layer=SELECT_LAYER, projector_type=PROJECTOR, spec=self.spec)

    def with_layers(self, layers: int | None) -> "Size":
        """With fewer decoder layers; None: with all."""
        if layers is None:
            return self
        if not 1 <= layers <= self.text["num_hidden_layers"]:
            raise UserError(f"--layers: {layers}, but the decoder has {self.text['num_hidden_layers']}; write 1 to that")
        return replace(self, text={**self.text, "num_hidden_layers": layers})


SIZES: Mapping[str, Size] = {
    "7b": Size(_llama(4096, 11008, 32, 32, 32), CLIP_L),
    "13b": Size(_llama(5120, 13824, 40, 40, 40), CLIP_L),
    "1.1b": Size(_llama(2048, 5632, 22, 32, 4), CLIP_L),
    # For a CPU: 148 million parameters, and a tower as deep as CLIP-L of few FLOPs that gives as many patches.
    "150m": Size(_llama(768, 2048, 14, 12, 12), _clip(128, 512, 24, 2, 336, 14)),
    "tiny": Size(_llama(64, 96, 2, 4, 2, 211), _clip(32, 64, 3, 2, 24, 4)),
}


def size_named(name: str, option: str = "--sizes") -> Size:
    """Raises UserError for one that is not there."""
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


def build(size: Size, execution: Execution, device: torch.device, seed: int = 0) -> Llava:
    """Our model with random weights in the dtype of `execution`: N(0, 0.02^2), norms near one, the projector as PyTorch draws a Linear."""
    model = build_llava(size.architecture, execution)
    generator = torch.Generator(device).manual_seed(seed)
    drawn = model.projector.draw(seed)
    for name, parameter in list(model.named_parameters()):
        own = drawn.get(name.removeprefix("projector.")) if name.startswith("projector.") else None
        if own is None:
            own = torch.randn(parameter.shape, device=device, generator=generator) * STD
            own += "norm" in name and name.endswith("weight")
        set_parameter(model, name, nn.Parameter(own.to(device, execution.dtype)))
    return model


def llava_of_transformers(size: Size, ours: Llava, attention: str, image_token: int, shared: Tensors) -> Any:
    """`LlavaForConditionalGeneration` over `shared`: our weights by our names, in the compute dtype. They are not copied."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config=dict(size.text),
        vision_config=dict(size.vision),
        image_token_index=image_token,
        vision_feature_layer=SELECT_LAYER,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )
    return _filled(LlavaForConditionalGeneration, config, attention, ours, "hf", shared)


def llama_of_transformers(size: Size, ours: Llava, attention: str, shared: Tensors) -> Any:
    """`LlamaForCausalLM` with our decoder's weights."""
    from transformers import LlamaConfig as Config
    from transformers import LlamaForCausalLM

    return _filled(LlamaForCausalLM, Config(**size.text, tie_word_embeddings=False), attention, ours, "llm", shared)


def clip_of_transformers(size: Size, ours: Llava, attention: str, shared: Tensors) -> Any:
    """`CLIPVisionModel` with our tower's weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return _filled(CLIPVisionModel, CLIPVisionConfig(**size.vision), attention, ours, "clip", shared)


def projector_as_sequential(size: Size, shared: Tensors) -> nn.Sequential:
    """The projector as the original builds it."""
    width, inputs = size.llama.hidden_size, size.clip.hidden_size
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width))
    for name, _ in list(module.named_parameters()):
        set_parameter(module, name, nn.Parameter(shared[f"projector.{name}"]))
    return module


def _filled(kind: Any, config: Any, attention: str, ours: Llava, layout: str, shared: Tensors) -> Any:
    config._attn_implementation = attention
    return filled(lambda: kind._from_config(config, dtype=ours.dtype, attn_implementation=attention), shared.__getitem__, layout).train()


def recompute_layers(module: Any, reentrant: bool) -> None:
    """Let a model of transformers keep each decoder layer's input only; its method has another name from 5.24 on."""
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each counted once."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def parameters_of(*modules: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers."""
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()
