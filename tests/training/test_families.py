"""Every family of decoders from training to export and back into training: what is written is read, bit for bit."""

import json

import pytest
import sentencepiece
import torch
from parallel_runs import launch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from fastllava.config import ModelConfig, check_config
from fastllava.errors import UserError
from fastllava.export import export
from fastllava.model.execution import Execution
from fastllava.model.ops import reference_ops
from fastllava.model.weights import load_llava
from fastllava.train import run
from fastllava.train.metrics.log import read_metrics
from fastllava.train.state import checkpoint

DECODERS = {
    "qwen2": {"model_type": "qwen2", "use_sliding_window": False},
    "qwen2 tied": {"model_type": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 4},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "mpt": {"model_type": "mpt", "tie_word_embeddings": True, "attn_config": {"clip_qkv": 0.5}},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral with a window": {"model_type": "mistral", "sliding_window": 4096},
    "llama": {"model_type": "llama"},
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    "llama 3": {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
}


def write_decoder(world, folder, **given):
    """A decoder of random weights as transformers writes it, and a tokenizer that leaves text as it is, as Llama's does."""
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(world / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": False, "tokenizer_class": "LlamaTokenizer"}))
    vocab = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()
    sizes = {"vocab_size": vocab, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {**sizes, "num_key_value_heads": 2, "tie_word_embeddings": False, **given}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def weights_of(world, folder):
    """Every parameter of a whole LLaVA, by our name."""
    config = ModelConfig(llm=folder, vision_tower=world / "clip")
    return dict(load_llava(config, Execution(reference_ops(), torch.float32), seed=0).named_parameters())


def first_loss(settings, out, **model):
    given = {"projector": None, **model}
    run(check_config(settings("finetune", output_dir=str(out), model=given, train={"max_steps": 1})), Console(quiet=True))
    return read_metrics(out)[0]["loss"]


def files_of(folder):
    return load_file(folder / "model.safetensors")


def equal(found, expected):
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "decoder",
    [
        pytest.param(name, marks=[] if name in ("qwen2", "qwen3", "mpt") else pytest.mark.exhaustive, id=name.replace(" ", "-"))
        for name in DECODERS
    ],
)
def test_results_and_checkpoints_are_exported_and_gone_on_from_bit_for_bit(settings, world, tmp_path, decoder):
    llm = write_decoder(world, tmp_path / "llm", **DECODERS[decoder])
    train = {"max_steps": 2, "checkpoint_steps": 1}
    done = tmp_path / "run"
    run(
        check_config(settings("finetune", model={"llm": str(llm)}, train=train, optim={"warmup_ratio": 0.0})),
        Console(quiet=True),
    )
    trained = weights_of(world, done)
    _, before = checkpoint.read_model(done / "checkpoint-1")
    assert not equal(trained, before)
    starts = [done]
    if decoder == "mpt":
        with pytest.raises(UserError, match=r"^--layout: hf holds no MPT, .*; write --layout llava$"):
            export(done, "hf", tmp_path / "hf", lambda line: None)
    for layout in ("llava",) if decoder == "mpt" else ("llava", "hf"):
        export(done / "checkpoint-1", layout, tmp_path / f"{layout}-1", lambda line: None)
        assert equal(weights_of(world, tmp_path / f"{layout}-1"), before)
        export(done, layout, tmp_path / layout, lambda line: None)
        starts.append(tmp_path / layout)
    assert all(equal(weights_of(world, start), trained) for start in starts)
    losses = {first_loss(settings, tmp_path / f"on-{start.name}", llm=str(start), tokenizer=str(llm)) for start in starts}
    assert len(losses) == 1, "the rows that an export adds for the image and as padding change no loss"


@pytest.mark.exhaustive
def test_two_processes_train_an_mpt_as_one_does(settings, world, tmp_path):
    """Its head is its embedding, and its blocks are sharded one by one, as Llama's layers are."""
    llm = write_decoder(world, tmp_path / "llm", **DECODERS["mpt"])
    train, optim = {"max_steps": 3, "recompute": "norms"}, {"warmup_ratio": 0.0, "max_grad_norm": 1.0}
    given = {"model": {"llm": str(llm)}, "train": train, "optim": optim}
    run(check_config(settings("finetune", output_dir=str(tmp_path / "one"), **given)), Console(quiet=True))
    launch(2, [(settings("finetune", output_dir=str(tmp_path / "two"), **given), None)], tmp_path / "said")
    (found, expected), (ours, theirs) = ([each(tmp_path / name) for name in ("two", "one")] for each in (read_metrics, files_of))
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in expected], rel=1e-5)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-4 * tensor.norm(), name
