"""Writing: projector and whole checkpoints, whole or not at all, and what the files beside the weights say."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fastllava.errors import UserError
from fastllava.model.weights import write, write_checkpoint, write_projector

TRAINED = {"image_policy": "pad", "max_tokens": 2048}


def read(folder, name):
    return json.loads((folder / name).read_text())


def write_original(model, folder, tiny, dtype=torch.float32, **given):
    write_checkpoint(model, "llava", folder, dtype, **{"source": tiny.config(), **TRAINED, **given})


def test_the_projector_is_written_under_the_originals_keys_in_both_formats(tiny, tmp_path):
    projector = tiny.load(projector="fresh").projector
    write_projector(projector, tmp_path, torch.bfloat16)
    safe = load_file(tmp_path / "mm_projector.safetensors")
    pickled = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
    assert list(pickled) == [f"model.mm_projector.{leaf}" for leaf in ("0.weight", "0.bias", "2.weight", "2.bias")]
    assert safe.keys() == pickled.keys()
    for name, tensor in projector.state_dict().items():
        assert torch.equal(safe[f"model.mm_projector.{name}"], tensor.bfloat16())
        assert torch.equal(pickled[f"model.mm_projector.{name}"], tensor.bfloat16())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mm_projector.bin", "mm_projector.safetensors"]
    again = tiny.load(projector=tmp_path / "mm_projector.bin", dtype=torch.bfloat16)
    assert torch.equal(again.projector.state_dict()["0.weight"], safe["model.mm_projector.0.weight"])


def test_the_original_layout_has_the_originals_keys_and_config(tiny, tmp_path):
    model = tiny.load(projector="fresh")
    write_original(model, tmp_path, tiny, torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert len(tensors) == len(model.state_dict())
    for name in (
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "lm_head.weight",
        "model.mm_projector.2.bias",
        "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight",
    ):
        assert name in tensors
    expected = {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": str(tiny.clip),
        "mm_hidden_size": 16,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "flat",
        "use_mm_proj": True,
        "image_aspect_ratio": "pad",
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 2048,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_projector_lr": None,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 96,
        "rope_scaling": None,
    }
    config = read(tmp_path, "config.json")
    assert {name: config[name] for name in expected} == expected


def test_a_checkpoint_is_cut_into_shards_and_read_back(tiny, tmp_path, monkeypatch):
    model = tiny.load(projector="fresh")
    write_original(model, tmp_path, tiny)
    monkeypatch.setattr(write, "SHARD_BYTES", 20_000)
    write_original(model, tmp_path, tiny)
    index = read(tmp_path, "model.safetensors.index.json")
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    # The file of the first write is gone: transformers would read it before the index.
    assert files == [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))]
    assert len(files) > 3
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())
    assert max(sum(t.nbytes for t in load_file(tmp_path / file).values()) for file in files) <= 20_000
    again = tiny.load(llm=tmp_path)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    monkeypatch.undo()
    write_original(model, tmp_path, tiny)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors*")) == ["model.safetensors"]


def test_a_write_that_fails_leaves_what_was_there(tiny, tmp_path, monkeypatch):
    model = tiny.load(projector="fresh")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    write_original(model, tmp_path, tiny)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_original(tiny.load(projector="fresh", seed=8), tmp_path, tiny)
    with pytest.raises(OSError, match="No space left"):
        write_projector(model.projector, tmp_path, torch.float32)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_config_json_is_the_last_file_to_appear(tiny, tmp_path, monkeypatch):
    model = tiny.load(projector="fresh")
    moved = []
    replace = write.Path.replace
    monkeypatch.setattr(write.Path, "replace", lambda self, target: (moved.append(target.name), replace(self, target))[1])
    (tmp_path / ".writing-killed").mkdir()
    write_original(model, tmp_path, tiny)
    assert moved[-1] == "config.json"
    assert set(moved) == {path.name for path in tmp_path.iterdir()}


def test_settings_of_sampling_that_block_saving_are_left_out_and_said(tiny, tmp_path):
    folder = tiny.write_folder(tmp_path / "llm", tiny.LLM, tiny.llm_tensors(tiny.LLM))
    vicuna = {"bos_token_id": 1, "eos_token_id": 2, "max_length": 4096, "pad_token_id": 0, "temperature": 0.9, "top_p": 0.6}
    (folder / "generation_config.json").write_text(json.dumps({"_from_model_config": True, **vicuna}))
    model, said = tiny.load(llm=folder, projector="fresh"), []
    write_original(model, tmp_path / "out", tiny, source=tiny.config(llm=folder), report=said.append)
    assert read(tmp_path / "out", "generation_config.json") == {k: v for k, v in vicuna.items() if k not in ("temperature", "top_p")}
    assert said[-1] == "generation_config.json: left out temperature, top_p, which do_sample=false contradicts"
    (folder / "generation_config.json").write_text(json.dumps({**vicuna, "do_sample": True}))
    write_original(tiny.load(llm=folder, projector="fresh"), tmp_path / "out", tiny, report=said.append)
    assert read(tmp_path / "out", "generation_config.json")["temperature"] == 0.9


def test_without_a_tokenizer_the_original_layout_says_so_and_hf_is_refused(tiny, tmp_path):
    model, said = tiny.load(projector="fresh"), []
    write_original(model, tmp_path / "llava", tiny, report=said.append)
    assert said == [f"tokenizer: none written, as {tiny.llm} holds none"]
    with pytest.raises(UserError, match=r"^model\.tokenizer: no tokenizer\.model or tokenizer\.json in .*; put one there"):
        write_checkpoint(model, "hf", tmp_path / "hf", torch.float32, source=tiny.config(), **TRAINED)
    assert not list((tmp_path / "hf").iterdir())


@pytest.mark.parametrize("kind", ["linear", "mlp3x_gelu"])
def test_hf_cannot_hold_other_projectors(tiny, tmp_path, kind):
    model = tiny.load(projector_type=kind)
    with pytest.raises(UserError, match=rf"^--layout: hf holds mlp2x_gelu projectors only, this one is {kind}; write --layout llava"):
        write_checkpoint(model, "hf", tmp_path, torch.float32, source=tiny.config(projector_type=kind), **TRAINED)
    write_original(model, tmp_path, tiny)
    assert torch.equal(tiny.load(llm=tmp_path, projector_type=kind).state_dict()["llm.lm_head.weight"], model.llm.head_weight)


@pytest.mark.parametrize(
    "rope",
    [
        {"type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_rope_scaling_survives_in_the_spelling_both_transformers_read(tiny, tmp_path, rope):
    config = {**tiny.LLM, "rope_parameters": {**rope, "rope_theta": 5000.0}}
    model = tiny.load(llm=tiny.write_folder(tmp_path / "llm", config, tiny.llm_tensors(config)), projector="fresh")
    write_original(model, tmp_path / "out", tiny)
    written = read(tmp_path / "out", "config.json")
    assert written["rope_scaling"] == rope
    assert written["rope_theta"] == 5000.0
    assert "rope_parameters" not in written
    assert tiny.load(llm=tmp_path / "out").llm.config == model.llm.config
