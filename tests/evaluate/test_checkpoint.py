"""A checkpoint of any kind becomes a model that can be asked: the same one, however it is stored."""

import json
import shutil

import pytest
import torch

from fastllava.errors import UserError
from fastllava.evaluate.checkpoint import load_trained
from fastllava.export import export


def test_a_layout_llava_says_what_it_was_trained_with(tiny_llava):
    said = []
    trained = load_trained(tiny_llava, said.append)
    assert (trained.name, trained.form.name, trained.image_policy, trained.max_tokens) == ("llava", "v1", "pad", 2048)
    assert trained.stops == (2,)
    assert (trained.device.type, trained.model.dtype) == ("cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    assert not any(parameter.requires_grad for parameter in trained.model.parameters())
    assert any("image policy pad, and template v1, as it names none" in line for line in said)


def test_an_export_in_the_other_layout_is_the_same_model(tiny_llava, tmp_path):
    export(tiny_llava, "hf", tmp_path / "hf", lambda line: None)
    ours, theirs = load_trained(tiny_llava), load_trained(tmp_path / "hf")
    assert dict(theirs.model.named_parameters()).keys() == dict(ours.model.named_parameters()).keys()
    assert theirs.identity == ours.identity
    assert (theirs.form, theirs.image_policy, theirs.stops) == (ours.form, ours.image_policy, ours.stops)
    assert theirs.max_tokens == 2048
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    for length, read in ((512, 512), (10**30, 2048)):
        (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": length}))
        assert load_trained(tmp_path / "hf").max_tokens == read
    # What the chat template writes names the template.
    (tmp_path / "hf" / "chat_template.jinja").write_text(_jinja("chatml_direct"), encoding="utf-8")
    assert load_trained(tmp_path / "hf").form.name == "chatml_direct"
    export(tmp_path / "hf", "llava", tmp_path / "llava", lambda line: None)
    again = load_trained(tmp_path / "llava")
    assert (again.form.name, again.identity) == ("chatml_direct", ours.identity)


def test_another_precision_is_the_same_model(tiny_llava):
    half = load_trained(tiny_llava, precision="bf16")
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    assert half.model.dtype == torch.bfloat16
    assert half.identity == load_trained(tiny_llava).identity


def test_other_weights_are_another_model(tiny_llava, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_llava.parent, tmp_path / "copy")
    assert load_trained(tmp_path / "copy" / "llava").identity == load_trained(tiny_llava).identity
    tensors = load_file(tiny_llava / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "copy" / "llava" / "model.safetensors", metadata={"format": "pt"})
    assert load_trained(tmp_path / "copy" / "llava").identity != load_trained(tiny_llava).identity


def test_what_cannot_be_asked_is_one_line(tiny_llava, tmp_path):
    with pytest.raises(UserError, match=r"^CHECKPOINT: .* is no folder; give the output_dir of a run"):
        load_trained(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"^--precision: 'fp8' is none; write one of auto, fp32, bf16, fp16$"):
        load_trained(tiny_llava, precision="fp8")
    with pytest.raises(UserError, match=r"^--template: no template 'v9'; write one of plain, "):
        load_trained(tiny_llava).with_template("v9")
    shutil.copytree(tiny_llava.parent, tmp_path / "copy")
    (tmp_path / "copy" / "llava" / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"^CHECKPOINT: .* holds no tokenizer.model and no tokenizer.json; give"):
        load_trained(tmp_path / "copy" / "llava")


def _jinja(name):
    from fastllava.data.templates import template
    from fastllava.export.chat_template import chat_template

    return chat_template(template(name))
