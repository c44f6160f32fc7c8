"""Tiny models in transformers' formats, and batches packed row by row, for the tests of the model and its formats."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastllava.batch import IMAGE_ID, Batch
from fastllava.config import ModelConfig
from fastllava.model.execution import Execution
from fastllava.model.llava import Llava
from fastllava.model.ops import Ops, choose_ops
from fastllava.model.weights import load_llava

VOCAB, WIDTH, SIDE, PATCH = 96, 32, 12, 4
PATCHES = (SIDE // PATCH) ** 2

LLM = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


@dataclass
class TinySample:
    """ids with IMAGE_ID at each image, and which of the ids are supervised."""

    ids: list[int]
    supervised: set[int] = field(default_factory=set)
    images: list[Tensor] = field(default_factory=list)


def image(seed: int) -> Tensor:
    """uint8 [3, SIDE, SIDE]."""
    return torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def mixed_samples() -> list[TinySample]:
    """Samples with an image, without one, of several turns, with two images, with an image first and with an image last."""
    return [
        TinySample([1, 7, IMAGE_ID, 13, 20, 21, 2], {5, 6}, [image(1)]),
        TinySample([1, 30, 31, 32, 33], {3, 4}),
        TinySample([1, 8, IMAGE_ID, 13, 40, 2, 9, 41, 42, 2, 9, 43, 2], {4, 5, 7, 8, 9, 11, 12}, [image(2)]),
        TinySample([IMAGE_ID, 50, IMAGE_ID, 51, 52], {3, 4}, [image(3), image(4)]),
        TinySample([1, 60, 61, IMAGE_ID], {2}, [image(5)]),
        TinySample([1, 70, 71, 72], set()),
    ]


def pack_by_hand(samples: Sequence[TinySample], weight: float = 1.0) -> Batch:
    """The contract of Batch, spelled out row by row."""
    token_ids, positions, starts, patch_rows, text_rows, rows, targets = [], [], [0], [], [], [], []
    for sample in samples:
        first = starts[-1]
        at = 0
        for index, token in enumerate(sample.ids):
            if token == IMAGE_ID:
                patch_rows += range(first + at, first + at + PATCHES)
                token_ids += [0] * PATCHES
                at += PATCHES
                continue
            if index in sample.supervised:
                rows.append(first + at - 1)
                targets.append(token)
            token_ids.append(token)
            text_rows.append(first + at)
            at += 1
        positions += range(at)
        starts.append(first + at)
    images = [picture for sample in samples for picture in sample.images]
    return Batch(
        token_ids=torch.tensor(token_ids),
        position_ids=torch.tensor(positions),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        max_seqlen=max(b - a for a, b in pairwise(starts)),
        pixels=torch.stack(images) if images else torch.zeros(0, 3, SIDE, SIDE, dtype=torch.uint8),
        patch_rows=torch.tensor(patch_rows, dtype=torch.int32),
        text_rows=torch.tensor(text_rows, dtype=torch.int32),
        supervised_rows=torch.tensor(rows, dtype=torch.int32),
        targets=torch.tensor(targets, dtype=torch.int64),
        weights=torch.full((len(rows),), weight),
    )


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """A model folder of this config.json and one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def llm_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors by transformers' names for a config.json of any family."""
    from fastllava.model.decoders import build_decoder
    from fastllava.model.weights.configs import decoder_config

    with torch.device("meta"):
        module = build_decoder(decoder_config(config, "test"), reference_ops())
    return random_like(module, seed)


def clip_tensors(config: Mapping[str, Any] = CLIP, seed: int = 1) -> dict[str, Tensor]:
    """Random tensors by transformers' names for a CLIP vision config.json."""
    from fastllava.model.towers import Tower
    from fastllava.model.weights.tower_configs import tower_config

    with torch.device("meta"):
        module = Tower(tower_config(config, "test"), reference_ops(), -2)
    return random_like(module, seed)


def random_like(module: torch.nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(p.shape, generator=generator) * 0.2 for name, p in module.named_parameters()}
    return {name: t + ("norm" in name and name.endswith("weight")) for name, t in tensors.items()}


def reference_ops(dtype: torch.dtype = torch.float32) -> Ops:
    return choose_ops({}, torch.device("cpu"), dtype)


class Tiny:
    """The helpers that the tests build with, in one object, as test modules cannot import each other."""

    LLM = LLM
    CLIP = CLIP
    PATCHES = PATCHES
    Sample = TinySample
    pack = staticmethod(pack_by_hand)
    mixed = staticmethod(mixed_samples)
    write_folder = staticmethod(write_folder)
    llm_tensors = staticmethod(llm_tensors)
    clip_tensors = staticmethod(clip_tensors)

    def __init__(self, llm: Path, clip: Path) -> None:
        self.llm, self.clip, self.ops = llm, clip, reference_ops()

    def config(self, **given: Any) -> ModelConfig:
        return ModelConfig(**{"llm": self.llm, "vision_tower": self.clip, **given})

    def load(self, dtype: torch.dtype = torch.float32, seed: int = 0, **given: Any) -> Llava:
        return load_llava(self.config(**given), Execution(reference_ops(dtype), dtype), seed)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    llm = write_folder(root / "llm", LLM, llm_tensors(LLM))
    clip = write_folder(root / "clip", CLIP, clip_tensors())
    return Tiny(llm, clip)
