"""A world small enough to train in seconds: backbones, tokenizer, pictures and records, made here; and configs of runs in it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}


def make_world(root: Path) -> None:
    """Fill `root` with llm/ (and its tokenizer.model), clip/, images/, captions.json, chats.json (some without an image), texts.json."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    captions, chats, texts = [], [], []
    for i in range(24):
        colour = list(COLOURS)[i % len(COLOURS)]
        size = rng.integers(20, 60, 2)
        noise = rng.integers(-15, 15, (*size, 3))
        Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8)).save(root / "images" / f"{i}.png")
        caption = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": f"a {colour} wall"}]
        captions.append({"id": f"cap{i}", "image": f"{i}.png", "conversations": caption})
        question = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": colour}]
        more = [{"from": "human", "value": "Are you sure?"}, {"from": "gpt", "value": f"Yes, it is {colour}."}]
        chats.append({"id": f"chat{i}", "image": f"{i}.png", "conversations": question + more * (i % 3)})
        text = [{"from": "human", "value": f"Count to {i}."}, {"from": "gpt", "value": " ".join(str(n) for n in range(i + 1))}]
        if i % 3 == 0:
            texts.append({"id": f"text{i}", "conversations": text})
            chats.append(texts[-1])
    (root / "captions.json").write_text(json.dumps(captions))
    (root / "chats.json").write_text(json.dumps(chats))
    (root / "texts.json").write_text(json.dumps(texts))

    (root / "llm").mkdir()
    text = "\n".join(turn["value"] for record in captions + chats for turn in record["conversations"])
    text += "\nA chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT: helpful, detailed, polite answers"
    (root / "corpus.txt").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "corpus.txt"), model_prefix=str(root / "llm" / "tokenizer"), vocab_size=400, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (root / "llm" / "tokenizer_config.json").write_text(json.dumps({"legacy": False, "tokenizer_class": "LlamaTokenizer"}))
    vocab = sentencepiece.SentencePieceProcessor(model_file=str(root / "llm" / "tokenizer.model")).vocab_size()
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(llama).save_pretrained(root / "llm")
    clip = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14)
    CLIPVisionModel(clip).save_pretrained(root / "clip")


def small_config(world: Path, out: Path, stage: str = "pretrain", **sections: Any) -> dict[str, Any]:
    """A small config of a stage as plain values, for a run in `out`; sections are merged into it."""
    records = "captions.json" if stage == "pretrain" else "chats.json"
    values = {
        "stage": stage,
        "output_dir": str(out),
        "model": {"llm": str(world / "llm"), "vision_tower": str(world / "clip"), "projector": "fresh"},
        "data": {"records": str(world / records), "images": str(world / "images"), "workers": 0},
        "optim": {"lr": 1e-2},
        "train": {"global_batch": 4, "reference_micro_batch": 2, "precision": "fp32", "micro_batch_tokens": 150},
    }
    for section, change in sections.items():
        values[section] = {**values[section], **change} if isinstance(change, dict) and section in values else change
    return values


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with llm/ (and its tokenizer.model), clip/, images/, captions.json, chats.json (some without an image), texts.json."""
    root = tmp_path_factory.mktemp("world")
    make_world(root)
    return root


@pytest.fixture
def settings(world, tmp_path):
    """`settings(stage, **sections)`: a small config of a stage as plain values; sections are merged into it."""

    def make(stage: str = "pretrain", **sections):
        return small_config(world, tmp_path / "run", stage, **sections)

    return make
