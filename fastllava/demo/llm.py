"""The demo's language model: a small Llama that has read the training set's sentences, without a picture."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastllava.batch import ImageSpec
from fastllava.data.loader import Sample, pack
from fastllava.data.tokenizer import Tokenizer
from fastllava.demo.backbones import BackboneSizes, draw_weights, fit, write_json, write_model
from fastllava.demo.tokens import write_tokenizer
from fastllava.model.llama import Llama
from fastllava.model.ops import Ops
from fastllava.model.weights.configs import llama_config

BATCH = 32
MAX_TOKENS = 2048
# Text alone: no image, no patches.
_NO_IMAGES = ImageSpec(1, 0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def make_llm(folder: Path, texts: Sequence[str], sizes: BackboneSizes, ops: Ops, seed: int) -> float:
    """Train tokenizer and language model on `texts` and write their folder; the last loss, nats a token.

    It learns how captions, questions and answers are worded. What is in a picture it cannot know: it has not seen one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, texts, sizes.vocabulary)
    tokenizer = Tokenizer.load(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": sizes.llm_width,
        "intermediate_size": 3 * sizes.llm_width,
        "num_hidden_layers": sizes.llm_layers,
        "num_attention_heads": sizes.llm_heads,
        "num_key_value_heads": sizes.llm_heads,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_TOKENS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    llm = Llama(llama_config(config, "the demo's language model"), ops)
    draw_weights(llm, 0.05, torch.Generator().manual_seed(seed))
    chosen = random.Random(seed).choices(texts, k=sizes.llm_texts)
    steps = -(-len(chosen) // BATCH)
    last = fit(list(llm.parameters()), _losses(llm, tokenizer, chosen, ops), steps, lr=2e-3)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    write_model(folder, llm, config)
    return last


def _losses(llm: Llama, tokenizer: Tokenizer, texts: Sequence[str], ops: Ops) -> Iterator[Tensor]:
    for begin in range(0, len(texts), BATCH):
        samples = []
        for text in texts[begin : begin + BATCH]:
            ids = np.array([1, *tokenizer.encode(text), 2], np.int32)
            samples.append(Sample(ids, np.array([[1, len(ids)]], np.int32), [], 1.0))
        batch = pack(samples, _NO_IMAGES, MAX_TOKENS)
        embedded = F.embedding(batch.token_ids, llm.embedding_weight)
        hidden = llm(embedded, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
        weights = batch.weights / len(batch.weights)
        yield ops.masked_linear_cross_entropy(hidden, llm.head_weight, batch.supervised_rows, batch.targets, weights)
