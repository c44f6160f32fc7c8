"""Reading: every layout and spelling, and what is wrong with a folder said in one line that names it."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastllava.data.tokenizer import Tokenizer
from fastllava.errors import UserError
from fastllava.model.weights import read_origin
from fastllava.model.weights.configs import FAMILIES, family_of
from fastllava.model.weights.layouts import to_disk


def same(model, other):
    """The two models have the same parameters, bit for bit."""
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def refused(tiny, pattern, **given):
    with pytest.raises(UserError, match=pattern) as error:
        tiny.load(**given)
    assert "\n" not in str(error.value)


def test_sharded_and_bin_folders_give_the_same_model(tiny, tmp_path):
    tensors = load_file(tiny.llm / "model.safetensors")
    names = list(tensors)
    for kind, suffix, save in (("model", "safetensors", save_file), ("pytorch_model", "bin", torch.save)):
        single, sharded = tmp_path / f"single_{suffix}", tmp_path / f"sharded_{suffix}"
        for folder in (single, sharded):
            folder.mkdir()
            shutil.copyfile(tiny.llm / "config.json", folder / "config.json")
        save(tensors, single / f"{kind}.{suffix}")
        files = {f"{kind}-00001-of-00002.{suffix}": names[::2], f"{kind}-00002-of-00002.{suffix}": names[1::2]}
        for file, part in files.items():
            save({name: tensors[name] for name in part}, sharded / file)
        weight_map = {name: file for file, part in files.items() for name in part}
        (sharded / f"{kind}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        for folder in (single, sharded):
            assert same(tiny.load(llm=folder, seed=1), tiny.load(seed=1)), folder


def test_a_bin_of_the_format_before_torch_1_6_is_read(tiny, tmp_path):
    shutil.copyfile(tiny.llm / "config.json", tmp_path / "config.json")
    tensors = load_file(tiny.llm / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert same(tiny.load(llm=tmp_path), tiny.load())


class Boom:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("what", ["llm", "projector"])
def test_a_bin_that_would_run_code_is_refused_and_does_not_run_it(tiny, tmp_path, what, new_format):
    ran = tmp_path / "ran"
    bad = {"model.mm_projector.0.weight": torch.ones(2), "payload": Boom(ran)}
    file = tmp_path / ("pytorch_model.bin" if what == "llm" else "mm_projector.bin")
    if new_format:
        torch.save(bad, file)
    else:
        file.write_bytes(pickle.dumps(bad, protocol=2))
    shutil.copyfile(tiny.llm / "config.json", tmp_path / "config.json")
    given = {"llm": tmp_path} if what == "llm" else {"projector": file}
    refused(tiny, rf"^model\.{what}: .*\.bin (holds more than plain tensors and was not loaded|cannot be read as weights)", **given)
    assert not ran.exists()
    Path.touch(*Boom(ran).__reduce__()[1])
    assert ran.exists()  # The payload does what it should: had it run, the test would have seen it.


@pytest.mark.parametrize(
    "value", ["../llm/model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "a\\b.safetensors", 3, None]
)
def test_an_index_cannot_name_files_outside_its_folder(tiny, tmp_path, value):
    shutil.copyfile(tiny.llm / "config.json", tmp_path / "config.json")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": value}}))
    refused(
        tiny, r"^model\.llm: .*index\.json places model\.norm\.weight in .*; an index may name files of its own folder only", llm=tmp_path
    )


def test_missing_unexpected_and_misshapen_tensors_are_named_with_shapes(tiny, tmp_path):
    tensors = load_file(tiny.llm / "model.safetensors")
    lacking = {name: t for name, t in tensors.items() if name != "model.layers.1.mlp.up_proj.weight"}
    folder = tiny.write_folder(tmp_path / "lacking", tiny.LLM, lacking)
    refused(tiny, r"^model\.llm: .* lacks llm\.model\.layers\.1\.mlp\.up_proj\.weight \[48, 32\]; give weights that fit", llm=folder)
    folder = tiny.write_folder(tmp_path / "extra", tiny.LLM, {**tensors, "model.layers.7.mlp.up_proj.weight": torch.ones(1)})
    refused(tiny, r"^model\.llm: .* holds model\.layers\.7\.mlp\.up_proj\.weight, which this model does not have", llm=folder)
    folder = tiny.write_folder(tmp_path / "foreign", tiny.LLM, {**tensors, "transformer.wte.weight": torch.ones(1)})
    refused(tiny, r"^model\.llm: .* holds transformer\.wte\.weight, which this model does not have", llm=folder)
    folder = tiny.write_folder(tmp_path / "narrow", {**tiny.LLM, "intermediate_size": 40}, tensors)
    refused(
        tiny,
        r"^model\.llm: .* has model\.layers\.0\.mlp\.\w+\.weight \[(48, 32|32, 48)\], where \[(40, 32|32, 40)\] is needed.*\(and 3 more\)",
        llm=folder,
    )
    ints = {**tensors, "model.norm.weight": torch.ones(32, dtype=torch.int8)}
    folder = tiny.write_folder(tmp_path / "ints", tiny.LLM, ints)
    refused(tiny, r"^model\.llm: .* has model\.norm\.weight in int8, where floating-point numbers are needed", llm=folder)


def test_a_projector_of_other_sizes_is_named_with_shapes(tiny, tmp_path):
    file = tmp_path / "mm_projector.bin"
    shapes = {"0.weight": (64, 16), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    torch.save({f"model.mm_projector.{name}": torch.zeros(shape) for name, shape in shapes.items()}, file)
    refused(
        tiny,
        r"^model\.projector: .*mm_projector\.bin has model\.mm_projector\.0\.weight \[64, 16\], where \[32, 16\] is needed; "
        r".*; give a projector trained with this tower, this LLM and this model\.projector_type$",
        projector=file,
    )
    torch.save({"model.mm_projector.weight": torch.zeros(32, 16), "model.mm_projector.bias": torch.zeros(32)}, file)
    refused(tiny, r"^model\.projector: .* lacks projector\.0\.weight \[32, 16\]", projector=file)
    assert tiny.load(projector=file, projector_type="linear").projector_source == str(file)


def test_a_tower_of_another_width_does_not_fit_the_projector(tiny, tmp_path):
    file = tmp_path / "mm_projector.safetensors"
    save_file({f"model.mm_projector.{name}": t for name, t in tiny.load(projector="fresh").projector.state_dict().items()}, file)
    clip = {**tiny.CLIP, "hidden_size": 8}
    folder = tiny.write_folder(tmp_path / "clip", clip, tiny.clip_tensors(clip))
    refused(
        tiny,
        r"^model\.projector: .* has model\.mm_projector\.0\.weight \[32, 16\], where \[32, 8\] is needed",
        projector=file,
        vision_tower=folder,
    )


@pytest.mark.parametrize("prefix", ["model.", "", "base_model.model.model.", "module.model."])
@pytest.mark.parametrize("name", ["mm_projector.bin", "mm_projector.safetensors", "non_lora_trainables.bin"])
def test_a_projector_with_any_prefix_is_read_from_file_or_folder(tiny, tmp_path, prefix, name):
    drawn = tiny.load(projector="fresh", seed=9).projector.state_dict()
    save = save_file if name.endswith("safetensors") else torch.save
    save({f"{prefix}mm_projector.{leaf}": tensor for leaf, tensor in drawn.items()}, tmp_path / name)
    for given in (tmp_path, tmp_path / name):
        model = tiny.load(projector=given)
        assert model.projector_source == str(tmp_path / name)
        assert all(torch.equal(model.projector.state_dict()[leaf], tensor) for leaf, tensor in drawn.items())


def test_a_projector_file_with_more_in_it_is_refused(tiny, tmp_path):
    file = tmp_path / "mm_projector.safetensors"
    drawn = tiny.load(projector="fresh").projector.state_dict()
    save_file({**{f"model.mm_projector.{k}": v for k, v in drawn.items()}, "model.embed_tokens.weight": torch.ones(2, 2)}, file)
    refused(tiny, r"^model\.projector: .* holds model\.embed_tokens\.weight, which this model does not have", projector=file)


def test_a_fresh_projector_depends_on_the_seed_alone_and_is_rounded(tiny):
    one, again, other = (tiny.load(seed=seed).projector.state_dict()["2.weight"] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    low = tiny.load(seed=1, dtype=torch.bfloat16)
    assert torch.equal(low.projector.state_dict()["2.weight"], one.bfloat16())
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert low.projector_source == "fresh"


HF_SPELLINGS = {
    "on disk": ("language_model.model.", "language_model.lm_head.", "multi_modal_projector.linear_", "vision_tower.vision_model."),
    "4.52": ("model.language_model.", "lm_head.", "model.multi_modal_projector.linear_", "model.vision_tower.vision_model."),
    "5.3 to 5.8": ("model.language_model.model.", "lm_head.", "model.multi_modal_projector.linear_", "model.vision_tower.vision_model."),
    "5.3 to 5.8 inside": ("model.language_model.model.", "model.language_model.lm_head.", "multi_modal_projector.linear_", "vision_tower."),
    "5.6": ("model.language_model.", "lm_head.", "model.multi_modal_projector.linear_", "model.vision_tower."),
    "5.23 fresh": ("language_model.model.", "language_model.lm_head.", "multi_modal_projector.linear_", "vision_tower."),
}


@pytest.mark.parametrize("spelling", HF_SPELLINGS)
def test_every_spelling_of_llava_hf_is_read(tiny, tmp_path, spelling):
    decoder, head, projector, tower = HF_SPELLINGS[spelling]
    model = tiny.load(projector="fresh", seed=4)
    tensors = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("llm.model.", decoder).replace("llm.lm_head.", head).replace("tower.vision_model.", tower)
        name = name.replace("projector.0.", f"{projector}1.") if name.startswith("projector.0") else name
        tensors[name.replace("projector.2.", f"{projector}2.") if name.startswith("projector.2") else name] = tensor
    config = {"model_type": "llava", "text_config": dict(tiny.LLM), "vision_config": dict(tiny.CLIP), "image_token_index": 95}
    folder = tiny.write_folder(tmp_path, config, tensors)
    found = tiny.load(llm=folder, vision_tower=None)
    assert same(found, model)
    assert found.projector_source == str(folder)
    assert read_origin(tiny.config(llm=folder, vision_tower=None)).image_token == 95


def padded_hf(tiny, folder, vocab, rows, **config):
    """A llava-hf checkpoint of a decoder of `vocab` tokens, its tables padded to `rows`; and the decoder's own folder."""
    llm = {**tiny.LLM, "vocab_size": vocab}
    plain = tiny.write_folder(folder / "llm", llm, tiny.llm_tensors(llm))
    model = tiny.load(llm=plain, projector="fresh", seed=4)
    tensors = {to_disk(name, "hf"): tensor for name, tensor in model.state_dict().items()}
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        tensors[name] = torch.cat((tensors[name], torch.full((rows - vocab, 32), 9.0)))
    given = {"model_type": "llava", "text_config": {**llm, "vocab_size": rows}, "vision_config": dict(tiny.CLIP), **config}
    return tiny.write_folder(folder / "hf", given, tensors), model


@pytest.mark.parametrize(
    ("vocab", "rows", "config", "kept"),
    [
        (96, 128, {"image_token_index": 96}, 96),
        (96, 128, {"image_token_id": 96}, 96),
        (96, 128, {"image_token_index": 90, "unpadded_vocab_size": 96}, 96),
        (128, 128, {"image_token_index": 100, "unpadded_vocab_size": 128}, 128),
        (128, 192, {"image_token_index": 60}, 192),
        (96, 100, {"image_token_index": 96}, 100),
    ],
)
def test_padding_from_the_image_token_on_is_no_part_of_the_loss(tiny, tmp_path, vocab, rows, config, kept):
    folder, model = padded_hf(tiny, tmp_path, vocab, rows, **config)
    found = tiny.load(llm=folder, vision_tower=None)
    assert found.llm.config.vocab_size == kept
    assert (found.llm.model.embed_tokens.weight.shape[0], found.llm.head_weight.shape[0]) == (kept, kept)
    if kept == vocab:
        assert same(found, model)
        batch = tiny.pack(tiny.mixed())
        assert torch.equal(found(batch), model(batch))
    assert any("are the image's and padding; they are left out" in note for note in found.origin.notes) == (kept < rows)


def original(tiny, folder, with_tower=True, **config):
    """A whole LLaVA in the original layout, its tower's weights shifted by one."""
    model = tiny.load(projector="fresh", seed=4)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("tower."):
            if with_tower:
                tensors[f"model.vision_tower.vision_tower.{name.removeprefix('tower.')}"] = tensor + 1
        else:
            tensors[name.removeprefix("llm.").replace("projector.", "model.mm_projector.")] = tensor
    given = {**tiny.LLM, "model_type": "llava_llama", "mm_vision_tower": "hub/clip", "mm_projector_type": "mlp2x_gelu", **config}
    return tiny.write_folder(folder, given, tensors), model


def test_every_name_of_a_decoder_that_is_written_or_about_is_read():
    for family, it in FAMILIES.items():
        assert {family_of({"model_type": name}, "x") for name in (family, it.llava, *it.also)} == {family}
    assert family_of({"model_type": "llava_qwen2"}, "x") == "qwen2", "runs of the first versions wrote it"


def test_a_whole_llava_of_the_original_with_and_without_its_tower(tiny, tmp_path):
    folder, model = original(tiny, tmp_path / "with")
    found = tiny.load(llm=folder)
    tower = found.tower.state_dict()
    assert all(torch.equal(tower[name], tensor + 1) for name, tensor in model.tower.state_dict().items())
    assert found.projector_source == str(folder)
    assert torch.equal(found.projector.state_dict()["2.weight"], model.projector.state_dict()["2.weight"])
    folder, model = original(tiny, tmp_path / "without", with_tower=False, model_type="llava")
    assert same(tiny.load(llm=folder), model)


def test_a_given_or_fresh_projector_wins_over_the_checkpoints(tiny, tmp_path):
    folder, _ = original(tiny, tmp_path / "whole")
    file = tmp_path / "mm_projector.safetensors"
    other = tiny.load(seed=77).projector.state_dict()
    save_file({f"model.mm_projector.{name}": tensor for name, tensor in other.items()}, file)
    for given in (file, "fresh"):
        found = tiny.load(llm=folder, projector=given, seed=77)
        assert torch.equal(found.projector.state_dict()["0.weight"], other["0.weight"])
        assert found.projector_source == str(given)


def test_the_tower_of_an_original_checkpoint_is_found_by_its_name(tiny, tmp_path):
    folder, _ = original(tiny, tmp_path / "whole")
    refused(tiny, r"^model\.vision_tower: is missing, and the tower 'hub/clip' of .* is in none of ", llm=folder, vision_tower=None)
    shutil.copytree(tiny.clip, tmp_path / "clip")
    assert tiny.load(llm=folder, vision_tower=None).origin.tower_folder == tmp_path / "clip"
    shutil.copytree(tiny.clip, folder / "vision_tower")
    assert tiny.load(llm=folder, vision_tower=None).origin.tower_folder == folder / "vision_tower"


@pytest.mark.parametrize(
    ("config", "pattern"),
    [
        ({"mm_vision_select_layer": -1}, r"^model\.select_layer: -2, but .* was trained with -1; write model\.select_layer=-1"),
        ({"mm_projector_type": "linear"}, r"^model\.projector_type: 'mlp2x_gelu', but .* has 'linear'; write model\.projector_type=linear"),
        (
            {"mm_vision_select_feature": "cls_patch"},
            r"^model\.llm: .*config\.json: the class row goes to its projector, which is not supported",
        ),
        ({"mm_use_im_start_end": True}, r"^model\.llm: .*config\.json: it has tokens around its images"),
        ({"image_aspect_ratio": "anyres"}, r"^model\.llm: .*config\.json: it was trained on several crops an image"),
        ({"mm_patch_merge_type": "spatial_unpad"}, r"^model\.llm: .*config\.json: it was trained on several crops an image"),
    ],
)
def test_a_llava_that_was_trained_otherwise_is_refused(tiny, tmp_path, config, pattern):
    folder, _ = original(tiny, tmp_path, **config)
    refused(tiny, pattern, llm=folder)


@pytest.mark.parametrize(
    ("config", "pattern"),
    [
        ({"model_type": "gpt2"}, r"model_type 'gpt2' is not supported; give a model of type llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu' is not supported; the decoder needs silu"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"head_dim": 33}, r"head_dim 33 is odd, and rotary positions turn pairs of columns; give a model whose head_dim"),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, r"num_attention_heads 6 does not divide hidden_size 32, and there is no"),
        ({"hidden_size": "32"}, r"hidden_size is '32'; a positive whole number is needed"),
        ({"rms_norm_eps": 0}, r"rms_norm_eps is 0; a positive number is needed"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            r"rope scaling 'yarn' is not supported; a model with none, linear or llama3 is",
        ),
        ({"rope_scaling": {"type": "linear"}}, r"rope scaling: factor is None; a positive number is needed"),
        ({"quantization_config": {"bits": 4}}, r"its weights are quantised; give the model in fp16, bf16 or fp32"),
        ({"attention_dropout": 0.1}, r"attention_dropout 0\.1 is not supported; write 0\.0"),
    ],
)
def test_an_llm_config_that_is_not_supported_is_refused(tiny, tmp_path, config, pattern):
    folder = tiny.write_folder(tmp_path, {**tiny.LLM, **config}, load_file(tiny.llm / "model.safetensors"))
    refused(tiny, r"^model\.llm: .*config\.json: " + pattern, llm=folder)


@pytest.mark.parametrize(
    ("config", "preprocessor", "pattern"),
    [
        ({"model_type": "dinov2"}, {}, r"model_type 'dinov2' is no CLIP or SigLIP vision model; give one of type clip, siglip, "),
        ({"hidden_act": "relu"}, {}, r"hidden_act 'relu' in config\.json; a CLIP tower has quick_gelu or gelu"),
        ({"num_attention_heads": 3}, {}, r"num_attention_heads 3 does not divide hidden_size 16"),
        ({"num_channels": 1}, {}, r"num_channels 1 is not supported; images are RGB"),
        ({}, {"crop_size": {"height": 24, "width": 24}}, r"crop_size .* is not the tower's image_size 12; make them equal"),
        ({}, {"rescale_factor": 1.0}, r"does not scale pixels by 1/255"),
        ({}, {"image_mean": [0.5]}, r"image_mean and image_std of the preprocessor need three numbers each"),
    ],
)
def test_a_tower_that_is_not_supported_is_refused(tiny, tmp_path, config, preprocessor, pattern):
    folder = tiny.write_folder(tmp_path, {**tiny.CLIP, **config}, load_file(tiny.clip / "model.safetensors"))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    refused(tiny, r"^model\.vision_tower: .*" + pattern, vision_tower=folder)


def test_pixels_are_normalised_as_the_preprocessor_says_and_else_as_clip_published(tiny, tmp_path):
    assert tiny.load().spec.mean == (0.48145466, 0.4578275, 0.40821073)
    folder = tiny.write_folder(tmp_path, tiny.CLIP, load_file(tiny.clip / "model.safetensors"))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"crop_size": 12, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.1, 0.2, 0.3]})
    )
    spec = tiny.load(vision_tower=folder).spec
    assert (spec.mean, spec.std, spec.size, spec.patches) == ((0.5, 0.5, 0.5), (0.1, 0.2, 0.3), 12, 9)


def test_a_hub_s_name_that_is_no_folder_here_is_told_with_the_command_that_downloads_it(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key, name in (("llm", "lmsys/vicuna-7b-v1.5"), ("vision_tower", "openai/clip-vit-large-patch14-336")):
        told = rf"^model\.{key}: {name}/config\.json does not exist; .*, or download it: hf download {name} --local-dir {name}$"
        refused(tiny, told, **{key: Path(name)})
    with pytest.raises(UserError, match=r"--local-dir lmsys/vicuna-7b-v1\.5$"):
        Tokenizer.load(Path("lmsys/vicuna-7b-v1.5"))
    # Begun and not finished.
    shutil.copytree(tiny.llm, tmp_path / "lmsys" / "vicuna", ignore=shutil.ignore_patterns("*.safetensors"))
    refused(
        tiny, r"^model\.llm: no weights in lmsys/vicuna; .*, or download it: hf download lmsys/vicuna --local-dir", llm=Path("lmsys/vicuna")
    )
    for path in (tmp_path / "nowhere", Path("nowhere"), Path("../models/vicuna"), Path("a/b/c")):
        refused(tiny, r"^model\.llm: (?!.*hf download)", llm=path)


def test_folders_that_are_no_models_are_refused_in_one_line(tiny, tmp_path):
    refused(tiny, r"^model\.llm: .*nowhere/config\.json does not exist; give the folder of a model", llm=tmp_path / "nowhere")
    refused(tiny, r"^model\.vision_tower: .*nowhere/config\.json does not exist", vision_tower=tmp_path / "nowhere")
    refused(
        tiny,
        r"^model\.projector: .*none\.bin does not exist; give mm_projector\.safetensors or \.bin of a pretrain run, or write fresh",
        projector=tmp_path / "none.bin",
    )
    refused(tiny, r"^model\.projector: no mm_projector\.safetensors and no mm_projector\.bin in ", projector=tmp_path)
    refused(tiny, r"^model\.vision_tower: is missing, and .* names no vision tower; give the folder of a CLIP", vision_tower=None)
    shutil.copyfile(tiny.llm / "config.json", tmp_path / "config.json")
    refused(tiny, r"^model\.llm: no weights in .*; it should hold one of model\.safetensors, ", llm=tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tiny.llm / "model.safetensors").read_bytes()[:-100])
    refused(tiny, r"^model\.llm: .*model\.safetensors cannot be read as weights \(.*\); fetch it again", llm=tmp_path)
    (tmp_path / "config.json").write_text("{'a': 1}")
    refused(tiny, r"^model\.llm: .*config\.json cannot be read as JSON \(.*\); fetch it again", llm=tmp_path)
    (tmp_path / "config.json").write_text("[]")
    refused(tiny, r"^model\.llm: .*config\.json holds a JSON list, an object is needed", llm=tmp_path)


def test_shards_that_are_missing_or_lack_a_tensor_are_named(tiny, tmp_path):
    shutil.copyfile(tiny.llm / "config.json", tmp_path / "config.json")
    index = tmp_path / "model.safetensors.index.json"
    names = list(load_file(tiny.llm / "model.safetensors"))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-1.safetensors")}))
    refused(tiny, r"^model\.llm: .*model-1\.safetensors is missing, and model\.safetensors\.index\.json names it", llm=tmp_path)
    tensors = load_file(tiny.llm / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model-1.safetensors")
    refused(tiny, r"^model\.llm: .*model-1\.safetensors lacks model\.norm\.weight, which the index says it holds", llm=tmp_path)
    index.write_text("{}")
    refused(tiny, r"^model\.llm: .*index\.json has no weight_map", llm=tmp_path)


def test_a_tied_head_may_be_on_disk_too_but_must_be_the_embedding(tiny, tmp_path):
    config = {**tiny.LLM, "tie_word_embeddings": True}
    tensors = tiny.llm_tensors(config)
    model = tiny.load(llm=tiny.write_folder(tmp_path / "one", config, tensors))
    assert "llm.lm_head.weight" not in model.state_dict()
    both = tiny.write_folder(tmp_path / "two", config, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert same(tiny.load(llm=both), model)
    other = tiny.write_folder(tmp_path / "three", config, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    refused(
        tiny, r"^model\.llm: .* says tie_word_embeddings and holds another lm_head\.weight; write tie_word_embeddings: false", llm=other
    )


def test_the_originals_checkpoint_is_read(golden, tiny):
    model = tiny.load(llm=golden / "trace" / "stage2", vision_tower=golden / "trace" / "clip")
    on_disk = load_file(golden / "trace" / "stage2" / "model.safetensors")
    assert torch.equal(model.projector.state_dict()["2.bias"], on_disk["model.mm_projector.2.bias"])
    assert torch.equal(model.llm.head_weight, on_disk["lm_head.weight"])
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in on_disk.values())
    assert model.spec.patches == 16


def test_what_is_loaded_does_not_live_in_the_file(tiny, tmp_path):
    folder = shutil.copytree(tiny.llm, tmp_path / "llm")
    model = tiny.load(llm=folder)
    before = model.llm.head_weight.clone()
    size = (folder / "model.safetensors").stat().st_size
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * size)
    assert torch.equal(model.llm.head_weight, before)
