"""transformers' own modules with a model's weights in them: what our modules are held against, and what it is measured against."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastllava.model.layers import set_parameter
from fastllava.model.llava import Llava
from fastllava.model.mpt import MptConfig
from fastllava.model.weights.config_files import text_config, tower_config
from fastllava.model.weights.layouts import to_ours

Weight = Callable[[str], Tensor]
"""The tensor to use for a weight, by our name of it."""


def decoder(ours: Llava, weight: Weight, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    """The causal language model of `ours` as transformers computes it (LlamaForCausalLM and its like).

    `attention` is transformers' word for the implementation, PyTorch's by default; of an MPT there is one. Its parameters are whatever
    `weight` gives for our names, so in that dtype and on that device.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    text = dict(text_config(ours))
    config = AutoConfig.for_model(text.pop("model_type"), **text)
    if isinstance(ours.llm.config, MptConfig):
        # It has one implementation, and biases for a sample of this many rows.
        attention, config.max_seq_len = "eager", ours.llm.config.window
    module = filled(lambda: AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention), weight, "llm")
    if ours.llm.config.tied:
        module.lm_head.weight = module.get_input_embeddings().weight
    return module


def tower(ours: Llava, weight: Weight, dtype: torch.dtype) -> Any:
    """The tower of `ours` as transformers computes it (CLIPVisionModel and its like), with the same choice of weights as `decoder`."""
    from transformers import AutoConfig, CLIPVisionModel, SiglipVisionModel

    described = dict(tower_config(ours))
    kind = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}[described["model_type"]]
    config = AutoConfig.for_model(described.pop("model_type"), **described)
    return filled(lambda: kind._from_config(config, dtype=dtype, attn_implementation="sdpa"), weight, "tower")


def filled(make: Callable[[], Any], weight: Weight, layout: str) -> Any:
    """The module of transformers that `make` gives, never materialised with weights of its own, with ours in it.

    `layout` says how its names read (weights.layouts). Raises RuntimeError when it has a parameter or a buffer that is not known.
    """
    with torch.device("meta"):
        module = make()
    for name, _ in list(module.named_parameters()):
        source = to_ours(name, layout)
        if source is None:
            raise RuntimeError(f"{type(module).__name__} of this transformers has {name}, which is no weight of LLaVA")
        set_parameter(module, name, nn.Parameter(weight(source)))
    _make_buffers(module)
    return module


def _make_buffers(module: nn.Module) -> None:
    """What a module computes when it is made, which it could not on the meta device."""
    device = next(module.parameters()).device
    for name, owner in list(module.named_modules()):
        buffers = dict(owner.named_buffers(recurse=False))
        if "inv_freq" in buffers:
            module.set_submodule(name, type(owner)(owner.config).to(device))
        elif "position_ids" in buffers:
            owner.position_ids = torch.arange(buffers["position_ids"].shape[-1], device=device).unsqueeze(0)
        elif buffers:
            raise RuntimeError(f"{type(owner).__name__} of this transformers has a buffer {next(iter(buffers))} that is not known here")
