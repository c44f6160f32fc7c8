"""The demo's tokenizer: byte-pair encoding trained on the drawn set's text, its files those of a Llama tokenizer."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from fastllava.data.templates import template


def write_tokenizer(folder: Path, texts: Sequence[str], vocabulary: int) -> None:
    """Train a sentencepiece model of at most `vocabulary` tokens on `texts`, and write it and its config into `folder`.

    As in Llama: <unk> 0, <s> 1, </s> 2, 256 bytes to fall back on, digits apart, a space put before every text.
    """
    form = template("v1")
    # The words of the template stand in every sample, so they deserve tokens of their own.
    opening = f"{form.system} {form.human}: {form.gpt}:"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, *[opening] * max(1, len(texts) // 20)]),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        unk_surface=" \u2047 ",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": False,
        "model_max_length": 2048,
        "padding_side": "right",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
