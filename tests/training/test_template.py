"""`data.template: auto`: which template it takes, and a run with it from training to an export that transformers answers with."""

import json

import pytest
import torch
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

from fastllava.certify.run import certify
from fastllava.config import check_config
from fastllava.data.templates import TEMPLATES
from fastllava.errors import UserError
from fastllava.evaluate.checkpoint import load_trained
from fastllava.export import export
from fastllava.train import run
from fastllava.train.metrics.log import read_metrics
from fastllava.train.template import with_template

FAMILY = {"qwen_3": "qwen3", "qwen_2_5": "qwen2", "llama_3": "llama", "mpt": "mpt"}


def write_llm(world, folder, model_type, marks, eos):
    """A decoder of random weights, and a byte-level tokenizer with these marks, <think> no special one, as Qwen3 has it."""
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train([str(world / "corpus.txt")], trainer)
    tokenizer.add_tokens([AddedToken(mark, special="think" not in mark, normalized=False) for mark in dict.fromkeys((*marks, eos))])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, **sizes, head_dim=16, num_key_value_heads=2, tie_word_embeddings=False, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def config_of(settings, llm, **given):
    return check_config(settings("finetune", model={"llm": str(llm), "projector": "fresh"}, **given))


@pytest.mark.parametrize("name", FAMILY)
def test_the_template_of_the_model_is_taken_and_said(settings, world, tmp_path, name):
    llm = write_llm(world, tmp_path / "llm", FAMILY[name], TEMPLATES[name].marks, TEMPLATES[name].marks[-1])
    config, said = config_of(settings, llm, data={"template": "auto"}), []
    assert with_template(config, said.append).data.template == name
    assert len(said) == 1
    assert said[0].startswith(f"data.template: auto takes {name}, which belongs to a language model of type {FAMILY[name]} ")
    named = config_of(settings, llm, data={"template": "v1"})
    assert with_template(named, said.append) is named
    assert len(said) == 1


def test_llama_2_takes_v1_and_stage_pretrain_plain(settings):
    for stage, name in (("finetune", "v1"), ("pretrain", "plain")):
        config = check_config(settings(stage, data={"template": "auto"}))
        assert with_template(config, lambda line: None).data.template == name


def test_a_model_whose_tokenizer_lacks_the_marks_is_refused_before_a_record_is_read(settings, world, tmp_path):
    llm = write_llm(world, tmp_path / "llm", "qwen3", ("<|im_start|>", "<|im_end|>"), "<|im_end|>")
    (records := tmp_path / "none.json").write_text("no records at all")
    config = config_of(settings, llm, data={"template": "auto", "records": str(records)})
    pattern = r"^data\.template: auto would take qwen_3 for a model of type qwen3, and .* has not the tokens for it; write one that fits \("
    with pytest.raises(UserError, match=pattern) as error:
        run(config, Console(quiet=True))
    assert "qwen_2_5" in str(error.value).split("fits (")[1]


def test_qwen3_from_training_and_resume_to_answers_and_export(settings, world, tmp_path):
    llm = write_llm(world, tmp_path / "llm", "qwen3", TEMPLATES["qwen_3"].marks, "<|im_end|>")
    config = config_of(settings, llm, data={"template": "auto"}, train={"max_steps": 2, "checkpoint_steps": 1})
    run(config, Console(quiet=True))
    done = tmp_path / "run"
    assert json.loads((done / "run_config.json").read_text())["data"]["template"] == "qwen_3"
    assert [row["step"] for row in read_metrics(done)] == [0, 1]
    assert run(config, Console(quiet=True)).summary, "auto and the template it took are one run"
    trained = load_trained(done)
    assert trained.form.name == "qwen_3"
    assert trained.stops[-1] == trained.tokenizer.control("<|im_end|>")
    lines = []
    export(done, "hf", tmp_path / "hf", lines.append)
    assert "check: its chat template writes, and marks as answers, what training does" in lines
    assert any("answers through generate" in line for line in lines)
    assert load_trained(tmp_path / "hf").form.name == "qwen_3"
    # A stage that goes on from a whole LLaVA takes the template that it names.
    export(done, "llava", tmp_path / "llava", lines.append)
    onward = config_of(settings, tmp_path / "llava", data={"template": "auto"})
    assert with_template(onward, lines.append).data.template == "qwen_3"
    assert "was trained with" in lines[-1]


@pytest.mark.parametrize(("name", "family"), [("llava_next_qwen", "qwen2"), ("llava_next_llama_3", "llama")])
def test_llava_nexts_are_trained_exported_and_gone_on_with(settings, world, tmp_path, name, family):
    form = TEMPLATES[name]
    llm = write_llm(world, tmp_path / "llm", family, form.marks, form.end)
    config = config_of(settings, llm, data={"template": name}, train={"max_steps": 2})
    certificate = certify(config, lambda line: None, n_samples=4, n_steps=1)
    assert certificate.holds, certificate.verdict()
    run(config, Console(quiet=True))
    lines = []
    export(tmp_path / "run", "hf", tmp_path / "hf", lines.append)
    assert any("its chat template writes, and marks as answers, what training does" in line for line in lines), lines
    assert any("answers through generate" in line for line in lines)
    assert load_trained(tmp_path / "hf").form.name == name
    export(tmp_path / "run", "llava", tmp_path / "llava", lines.append)
    onward = config_of(settings, tmp_path / "llava", data={"template": "auto"})
    assert with_template(onward, lines.append).data.template == name
