"""What both of the demo's backbones share: sizes, random weights, a short training loop, and the folder they are written as.

Each backbone is trained a little before the two stages begin, as CLIP and Vicuna were before LLaVA's: a tower with random
weights tells the decoder too little, and a language model with random weights says nothing.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class BackboneSizes:
    """Sizes of both backbones, and how long each is trained."""

    image: int = 56
    """Side of the tower's input, pixels."""
    patch: int = 14
    tower_width: int = 128
    tower_blocks: int = 3
    """The last one never runs: LLaVA-1.5 takes the features before it."""
    tower_epochs: int = 8
    """Passes over the training pictures."""
    llm_width: int = 128
    llm_layers: int = 2
    llm_heads: int = 4
    vocabulary: int = 512
    """Tokens at most."""
    llm_texts: int = 2000
    """Texts that the language model reads."""


def draw_weights(model: nn.Module, std: float, generator: torch.Generator) -> None:
    """Fill every parameter: matrices, tables and vectors of their own from N(0, std), norms with 1, biases with 0."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1)
            else:
                parameter.normal_(0, std, generator=generator)


def fit(parameters: list[nn.Parameter], losses: Iterable[Tensor], steps: int, lr: float) -> float:
    """AdamW over `steps` losses, each a scalar of its own mini-batch: linear warm-up, then cosine to 0. The last loss."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    warm = max(1, steps // 20)
    last = torch.zeros(())
    for step, loss in enumerate(losses):
        rising, falling = (step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(rising, falling)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        last = loss.detach()
    return last.item()


def write_model(folder: Path, model: nn.Module, config: dict[str, Any]) -> None:
    """model.safetensors in fp32, then config.json: a folder that has it is whole."""
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
    )
    write_json(folder / "config.json", config)


def write_json(path: Path, value: Any) -> None:
    """Written beside and renamed, so that the file is either whole or not there."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(value, indent=2), encoding="utf-8")
    beside.replace(path)
