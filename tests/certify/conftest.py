"""A world small enough to certify in a second: decoders of every family, a tower, a tokenizer, records with and without images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

DECODERS = {
    "llama": {"model_type": "llama"},
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "llama_biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "mpt": {"model_type": "mpt", "attn_config": {"clip_qkv": 0.5}},
    "mistral": {"model_type": "mistral", "sliding_window": None},
}


PROMPT = "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:"


def write_records(root: Path) -> None:
    """Captions, and chats of which every third has no image; a chat is long enough to be cut at 110 rows."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    captions, chats = [], []
    for i in range(18):
        Image.fromarray(rng.integers(0, 256, (30, 40 + i, 3), dtype=np.uint8)).save(root / "images" / f"{i}.png")
        caption = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": f"a wall of {i} stones"}]
        captions.append({"id": f"cap{i}", "image": f"{i}.png", "conversations": caption})
        answer = " ".join(str(n) for n in range(60 if i == 4 else i + 1))
        if i % 3 == 2:
            chats.append({"id": f"text{i}", "conversations": [{"from": "human", "value": "Count."}, {"from": "gpt", "value": answer}]})
        else:
            turns = [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": answer}]
            more = [{"from": "human", "value": "Are you sure?"}, {"from": "gpt", "value": "Yes."}]
            chats.append({"id": f"chat{i}", "image": f"{i}.png", "conversations": turns + more * (i % 2)})
    (root / "captions.json").write_text(json.dumps(captions))
    (root / "chats.json").write_text(json.dumps(chats))


def write_tokenizer(root: Path) -> int:
    """The tokenizer's folder; its number of tokens."""
    (root / "tokenizer").mkdir()
    records = json.loads((root / "captions.json").read_text()) + json.loads((root / "chats.json").read_text())
    text = "\n".join(turn["value"] for record in records for turn in record["conversations"])
    # Many times, so that the system prompt takes few tokens.
    text += 50 * ("\nA chat between a curious user and an artificial intelligence assistant. " + PROMPT)
    (root / "corpus.txt").write_text(text)
    prefix = str(root / "tokenizer" / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "corpus.txt"), model_prefix=prefix, vocab_size=400, model_type="bpe", byte_fallback=True, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model").vocab_size()


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """With biases and norms off the zeros and ones that transformers starts them at, which hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a decoder's folder by each name of DECODERS, clip/, tokenizer/, images/, captions.json and chats.json."""
    root = tmp_path_factory.mktemp("world")
    write_records(root)
    vocab = write_tokenizer(root)
    torch.manual_seed(0)
    for name, fields in DECODERS.items():
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        config: Any = AutoConfig.for_model(**fields, **sizes, vocab_size=vocab, max_position_embeddings=512)
        shaken(AutoModelForCausalLM.from_config(config)).save_pretrained(root / name)
    clip = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14)
    shaken(CLIPVisionModel(clip)).save_pretrained(root / "clip")
    return root


@pytest.fixture
def settings(world: Path, tmp_path: Path):
    """`settings(stage, **sections)`: a small config of a stage as plain values; sections are merged into it."""

    def make(stage: str = "finetune", llm: str = "llama", **sections: Any) -> dict[str, Any]:
        records = "captions.json" if stage == "pretrain" else "chats.json"
        values: dict[str, Any] = {
            "stage": stage,
            "output_dir": str(tmp_path / "run"),
            "model": {
                "llm": str(world / llm),
                "vision_tower": str(world / "clip"),
                "projector": "fresh",
                "tokenizer": str(world / "tokenizer" / "tokenizer.model"),
            },
            "data": {
                "records": str(world / records),
                "images": str(world / "images"),
                "workers": 0,
                "legacy": False,
                "max_tokens": 110,
                "group_by_modality": False,
            },
            "train": {"global_batch": 8, "reference_micro_batch": 4, "precision": "fp32", "micro_batch_tokens": 200, "device": "cpu"},
        }
        for section, change in sections.items():
            values[section] = {**values[section], **change} if isinstance(change, dict) and section in values else change
        return values

    return make
