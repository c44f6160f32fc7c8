"""What is said of weights that do not fit names what was found and a remedy that works."""

import json

import pytest
import torch

from fastllava.errors import UserError


def projector_file(tmp_path, names_and_shapes):
    path = tmp_path / "p.bin"
    torch.save({name: torch.zeros(shape) for name, shape in names_and_shapes.items()}, path)
    return path


def test_foreign_names_with_the_right_shapes_are_listed_with_those_that_are_read(tiny, tmp_path):
    vision, text = tiny.CLIP["hidden_size"], tiny.LLM["hidden_size"]
    held = {
        "_connector.0.weight": (text, vision),
        "_connector.0.bias": (text,),
        "_connector.2.weight": (text, text),
        "_connector.2.bias": (text,),
    }
    with pytest.raises(UserError, match=r"_connector\.0\.weight.*rename its tensors to model\.mm_projector\.0\.weight"):
        tiny.load(projector=projector_file(tmp_path, held))


def test_a_projector_of_one_layer_names_the_key(tiny, tmp_path):
    text = tiny.LLM["hidden_size"]
    held = {"model.mm_projector.weight": (text, tiny.CLIP["hidden_size"]), "model.mm_projector.bias": (text,)}
    with pytest.raises(UserError, match=r"write model\.projector_type=linear"):
        tiny.load(projector=projector_file(tmp_path, held))
    tiny.load(projector=projector_file(tmp_path, held), projector_type="linear")


def test_an_adapter_is_recognised_whatever_lies_beside_it(tiny, tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}))
    (folder / "config.json").write_text((tiny.llm / "config.json").read_text())
    with pytest.raises(UserError, match=r"LoRA adapter .*lmsys/vicuna-7b-v1\.5.*; write model\.adapter="):
        tiny.load(llm=folder)
