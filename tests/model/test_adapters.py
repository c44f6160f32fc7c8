"""Folders of adapters: every layout read by our names, what is not computed refused in one line, and what we write taken by PEFT."""

import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastllava.config import TARGETS, LoraConfig
from fastllava.errors import UserError
from fastllava.model.weights.adapter_writing import write_adapter
from fastllava.model.weights.adapters import is_adapter_folder, read_adapter
from fastllava.model.weights.merging import LowRank

RANK = 3
OLD = ("auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern")
OLD += ("layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r", "revision", "target_modules", "task_type")
"""The fields of PEFT 0.4, which all later ones take."""
TREES = {
    "original": "base_model.model.model.layers.{layer}.{module}.lora_{part}.weight",
    "bare": "model.layers.{layer}.{module}.lora_{part}.weight",
    "live": "base_model.model.model.layers.{layer}.{module}.lora_{part}.default.weight",
    "wrapped": "module.base_model.model.model.layers.{layer}._fsdp_wrapped_module.{module}.lora_{part}.default.weight",
    "hf": "base_model.model.model.language_model.layers.{layer}.{module}.lora_{part}.weight",
    "hf_old": "base_model.model.language_model.model.layers.{layer}.{module}.lora_{part}.weight",
    "hf_live": "base_model.model.model.language_model.layers.{layer}.{module}.lora_{part}.default.weight",
}


def factors(tiny, targets=TARGETS, layers=2, rank=RANK, seed=5):
    """A and B by our names for the tiny decoder."""
    shapes = tiny.llm_tensors(tiny.LLM)
    generator, found = torch.Generator().manual_seed(seed), {}
    for layer in range(layers):
        for target in targets:
            module = f"{'self_attn' if target in TARGETS[:4] else 'mlp'}.{target}"
            out, wide = shapes[f"model.layers.{layer}.{module}.weight"].shape
            for part, shape in (("A", (rank, wide)), ("B", (out, rank))):
                found[f"llm.model.layers.{layer}.{module}.lora_{part}.weight"] = torch.randn(shape, generator=generator)
    return found


def spelled(tensors, tree):
    """The same tensors by the names of a tree of modules."""
    found = {}
    for name, tensor in tensors.items():
        layer, module, part = re.fullmatch(r"llm\.model\.layers\.(\d+)\.(.+)\.lora_([AB])\.weight", name).groups()
        found[TREES[tree].format(layer=layer, module=module, part=part)] = tensor
    return found


def folder_of(path, tensors, projector=None, file="adapter_model.safetensors", **fields):
    """An adapter's folder."""
    path.mkdir(parents=True, exist_ok=True)
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "lora_dropout": 0.1, "bias": "none", "base_model_name_or_path": "./llm"}
    (path / "adapter_config.json").write_text(json.dumps({**said, "target_modules": list(TARGETS), **fields}))
    (torch.save if file.endswith(".bin") else save_file)(tensors, path / file)
    if projector is not None:
        torch.save(
            {f"base_model.model.model.mm_projector.{name}": tensor for name, tensor in projector.items()}, path / "non_lora_trainables.bin"
        )
    return path


def equal(found, expected):
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("tree", TREES)
def test_every_spelling_gives_the_same_tensors_by_our_names(tiny, tmp_path, tree, file):
    expected = factors(tiny)
    adapter = read_adapter(folder_of(tmp_path / "it", spelled(expected, tree), file=file), "model.adapter")
    assert equal(adapter.tensors(), expected)
    assert (adapter.rank, adapter.alpha, adapter.scale, adapter.dropout) == (RANK, 6, 2.0, 0.1)
    assert (adapter.targets, adapter.base, adapter.projector()) == (TARGETS, "./llm", {})
    assert equal(adapter.to_be_added(2).tensors, expected)
    with pytest.raises(UserError, match=r"holds no adapter on layers\.2 q_proj, and its adapter_config\.json asks for one; fetch"):
        adapter.to_be_added(3)


@pytest.mark.parametrize("targets", [["v_proj", "q_proj"], r".*language_model.*\.(q|v)_proj", "all-linear"])
def test_targets_are_those_of_the_tensors_however_the_config_says_them(tiny, tmp_path, targets):
    tensors = spelled(factors(tiny, ("q_proj", "v_proj")), "hf")
    adapter = read_adapter(folder_of(tmp_path / "it", tensors, target_modules=targets), "model.adapter")
    assert adapter.targets == ("q_proj", "v_proj")


PROJECTOR = {"0.weight": torch.ones(4, 2), "0.bias": torch.ones(4), "2.weight": torch.ones(4, 4), "2.bias": torch.zeros(4)}


@pytest.mark.parametrize(
    ("start", "live"),
    [("model.multi_modal_projector.", ""), ("multi_modal_projector.", ""), ("model.multi_modal_projector.", "modules_to_save.default.")],
)
def test_a_projector_among_the_adapters_is_found(tiny, tmp_path, start, live):
    theirs = {"0": "linear_1", "2": "linear_2"}
    saved = {f"base_model.model.{start}{live}{theirs[name[0]]}{name[1:]}": tensor for name, tensor in PROJECTOR.items()}
    saved |= {f"base_model.model.{start}original_module.linear_1.weight": torch.zeros(4, 2)} if live else {}
    folder = folder_of(tmp_path / "it", spelled(factors(tiny), "hf") | saved, modules_to_save=["multi_modal_projector"])
    adapter = read_adapter(folder, "model.adapter")
    assert equal(adapter.projector(), {f"projector.{name}": tensor for name, tensor in PROJECTOR.items()})
    assert equal(adapter.tensors(), factors(tiny))


def test_the_originals_projector_is_found_beside_the_adapters(tiny, tmp_path):
    adapter = read_adapter(folder_of(tmp_path / "it", spelled(factors(tiny), "original"), PROJECTOR), "model.adapter")
    assert equal(adapter.projector(), {f"projector.{name}": tensor for name, tensor in PROJECTOR.items()})


def test_uniform_patterns_and_the_root_of_the_rank_are_computed(tiny, tmp_path):
    tensors = spelled(factors(tiny, ("q_proj", "up_proj")), "original")
    same = {"rank_pattern": {"q_proj": RANK, r"model\.layers\.\d+\.mlp.up_proj": RANK}, "alpha_pattern": {"[qu].*_proj": 12}, "r": 64}
    adapter = read_adapter(folder_of(tmp_path / "same", tensors, **same), "model.adapter")
    assert (adapter.rank, adapter.scale) == (RANK, 4.0)
    rooted = read_adapter(folder_of(tmp_path / "rooted", tensors, use_rslora=True), "model.adapter")
    assert rooted.scale == pytest.approx(6 / math.sqrt(RANK), rel=1e-15)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', and only LORA is computed"),
        ({"use_dora": True}, r"use_dora is True \(DoRA"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"rank_pattern": {"q_proj": 5}}, "of rank 3, and adapter_config.json says 5"),
        ({"r": 8}, "of rank 3, and adapter_config.json says 8"),
        ({"alpha_pattern": {"q_proj": 5}}, "alpha_pattern: gives .* alpha 6 and .*q_proj 5"),
        ({"alpha_pattern": {"(": 5}}, r"has the key '\(', which is not matched"),
        ({"alpha_pattern": {r"([\w.]+)+!": 5}}, "which is not matched .to match it could take for ever"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
        ({"layer_replication": [[0, 2], [1, 3]]}, r"layer_replication is \[\[0, 2\], \[1, 3\]\] \(it copies layers"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"something_of_a_later_version": 0.5}, "something_of_a_later_version is 0.5, which is not computed here"),
        ({"alpha_pattern": {".*.*.*x": 5}}, "to match it could take for ever"),
        ({"r": 10**400}, "r is '10+', which PEFT never writes"),
        ({"lora_alpha": float("nan")}, "lora_alpha is 'nan', which PEFT never writes"),
        ({"r": "3"}, "r is '3', which PEFT never writes"),
        ({"lora_alpha": True}, "lora_alpha is 'True', which PEFT never writes"),
        ({"lora_dropout": 1.5}, "lora_dropout is '1.5'"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is"),
    ],
)
def test_what_is_not_computed_is_one_line_with_the_remedy(tiny, tmp_path, fields, words):
    folder = folder_of(tmp_path / "it", spelled(factors(tiny), "original"), **fields)
    with pytest.raises(UserError, match=rf"^model\.adapter: .*adapter.*{words}.*; (merge it into its base|fetch)") as error:
        read_adapter(folder, "model.adapter")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight": (3, 4)}, "adapts the vision tower"),
        (
            {"base_model.model.model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.lora_A.weight": (3, 4)},
            "adapts the vision",
        ),
        ({"base_model.model.model.multi_modal_projector.linear_1.lora_A.weight": (3, 4)}, "adapts the projector"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": (3, 4)}, "only lora_A and lora_B of linear layers"),
        ({"base_model.model.lm_head.lora_A.weight": (3, 4)}, "adapts the head"),
        ({"base_model.model.model.embed_tokens.weight": (3, 4)}, "neither an adapter nor a projector"),
        ({"base_model.model.transformer.blocks.0.attn.Wqkv.lora_A.weight": (3, 4)}, "adapts no linear layer of a Llama-like decoder"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": (3,)}, "only lora_A and lora_B"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias": (3,)}, "only lora_A and lora_B"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.other.weight": (3, 4)}, "holds the adapters default, other"),
        ({"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": (3, 4)}, "without the other of lora_A and lora_B"),
    ],
)
def test_a_tensor_that_is_not_computed_is_named(tiny, tmp_path, names, words):
    more = {name: torch.ones(shape) for name, shape in names.items()}
    folder = folder_of(tmp_path / "it", spelled(factors(tiny), "original") | more)
    with pytest.raises(UserError, match=rf"^CHECKPOINT: .*adapter_model\.safetensors .*{words}.*; ") as error:
        read_adapter(folder, "CHECKPOINT")
    assert "\n" not in str(error.value)


def test_shapes_that_do_not_fit_and_files_that_are_not_there_are_said(tiny, tmp_path):
    tensors = spelled(factors(tiny), "original")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    with pytest.raises(UserError, match=r"lora_A\.weight \[0\] with B .*a sharded one saves empty tensors"):
        read_adapter(folder_of(tmp_path / "empty", {**tensors, name: torch.zeros(0)}), "model.adapter")
    with pytest.raises(UserError, match="holds no lora_A and no lora_B"):
        read_adapter(folder_of(tmp_path / "none", {}), "model.adapter")
    folder = folder_of(tmp_path / "gone", tensors)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds adapter_config\.json and none of adapter_model\.safetensors, adapter_model\.bin; fetch"):
        read_adapter(folder, "model.adapter")
    with pytest.raises(UserError, match=r"^model\.adapter: .* is no folder; give the folder of a LoRA adapter"):
        read_adapter(tmp_path / "nowhere", "model.adapter")
    other = folder_of(tmp_path / "other", tensors, {**PROJECTOR, "../embed_tokens.weight": torch.ones(2)})
    torch.save({"base_model.model.model.embed_tokens.weight": torch.ones(2)}, other / "non_lora_trainables.bin")
    with pytest.raises(UserError, match=r"embed_tokens\.weight, and only a projector's tensors are read"):
        read_adapter(other, "model.adapter")


def test_a_bin_with_code_is_refused(tiny, tmp_path):
    folder = folder_of(tmp_path / "it", spelled(factors(tiny), "original"), file="adapter_model.bin")
    torch.save({"x": print}, folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin (holds more than plain tensors|cannot be read)"):
        read_adapter(folder, "model.adapter")


def test_folders_of_adapters_are_told_from_whole_models(tiny, tmp_path):
    folder = folder_of(tmp_path / "it", spelled(factors(tiny), "original"))
    assert is_adapter_folder(folder)
    assert not is_adapter_folder(tiny.llm)
    (folder / "pytorch_model.bin").touch()
    assert not is_adapter_folder(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_in_fp32_rounds_once(dtype):
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((40, 24), (3, 24), (40, 3)))
    low = LowRank(2.0, {"it.lora_A.weight": a, "it.lora_B.weight": b}, "")
    assert low.weights == {"it.weight"}
    merged = low.merged("it.weight", weight.to(dtype), dtype)
    exact = weight.to(dtype).double() + 2.0 * b.double() @ a.double()
    assert merged.dtype == dtype
    # One rounding: half an ulp of the dtype, and what fp32 adds.
    assert ((merged.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 3e-6).all()
    other = low.merged("other.weight", weight, dtype)
    assert torch.equal(other, weight.to(dtype))
    assert other.data_ptr() != weight.data_ptr()


def lora(**given):
    return LoraConfig(**{"rank": RANK, "alpha": 6.0, "dropout": 0.1, **given})


def test_what_is_written_is_read_back(tiny, tmp_path):
    state = {**factors(tiny), **{f"projector.{name}": tensor for name, tensor in PROJECTOR.items()}}
    files = write_adapter(
        tmp_path / "out", "llava", lora(), {**state, "llm.model.norm.weight": torch.ones(4)}, torch.float32, base="./llm", config={"a": 1}
    )
    assert files == ["adapter_config.json", "adapter_model.safetensors", "config.json", "non_lora_trainables.bin"]
    for layout in ("llava", "hf"):
        write_adapter(tmp_path / layout, layout, lora(), state, torch.float32, base="./llm")
        adapter = read_adapter(tmp_path / layout, "model.adapter")
        assert equal({**adapter.tensors(), **adapter.projector()}, state)
        assert (adapter.rank, adapter.alpha, adapter.dropout, adapter.targets, adapter.base) == (RANK, 6, 0.1, TARGETS, "./llm")


def test_the_golden_layouts_are_read(larger, tmp_path):
    lora_files = larger / "lora"
    expected = torch.load(lora_files / "layouts" / "adapter_model_peft_0.4.0.bin", weights_only=True)
    configs = sorted((lora_files / "layouts").glob("adapter_config_peft_*.json"))
    assert len(configs) == 7
    for config in configs:
        folder = tmp_path / config.stem
        folder.mkdir()
        shutil.copyfile(config, folder / "adapter_config.json")
        shutil.copyfile(lora_files / "layouts" / "adapter_model_peft_0.4.0.bin", folder / "adapter_model.bin")
        adapter = read_adapter(folder, "model.adapter")
        assert (adapter.rank, adapter.alpha, adapter.dropout, adapter.targets) == (4, 8, 0.05, TARGETS)
        adapter.to_be_added(3)
        found = {name.replace("base_model.model.", "llm."): tensor for name, tensor in expected.items()}
        assert equal(adapter.tensors(), found)


@pytest.mark.parametrize("name", ["adapter", "task_adapter"])
def test_the_originals_folders_are_read_and_written_name_for_name(larger, tmp_path, name):
    folder = larger / "lora" / name
    adapter = read_adapter(folder, "CHECKPOINT")
    assert len(adapter.tensors()) == 42
    assert sorted(adapter.projector()) == ["projector.0.bias", "projector.0.weight", "projector.2.bias", "projector.2.weight"]
    config = json.loads((folder / "config.json").read_text())
    given = lora(rank=adapter.rank, alpha=float(adapter.alpha), dropout=adapter.dropout)
    state = {**adapter.tensors(), **adapter.projector()}
    files = write_adapter(tmp_path, "llava", given, state, torch.float32, base=adapter.base or "", config=config)
    assert sorted(files) == sorted(path.name for path in folder.iterdir())
    assert equal(load_file(tmp_path / "adapter_model.safetensors"), load_file(folder / "adapter_model.safetensors"))
    theirs = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    assert equal(torch.load(tmp_path / "non_lora_trainables.bin", weights_only=True), dict(theirs))
    written, said = (json.loads((place / "adapter_config.json").read_text()) for place in (tmp_path, folder))
    oldest = json.loads((larger / "lora" / "layouts" / "adapter_config_peft_0.4.0.json").read_text())
    assert sorted(written) == sorted(OLD) == sorted(oldest)
    assert set(written.pop("target_modules")) == set(said["target_modules"])
    assert written == {key: said[key] for key in written}


def test_merging_as_the_original_gives_its_weights(larger):
    adapter = read_adapter(larger / "lora" / "adapter", "CHECKPOINT")
    low = replace(adapter.to_be_added(3), how="fp16")
    base = load_file(larger / "trace" / "llm" / "model.safetensors")
    merged = load_file(larger / "lora" / "merged_fp16_linears.safetensors")
    assert len(low.weights) == 21
    for name in low.weights:
        theirs = merged[name.removeprefix("llm.")]
        ours = low.merged(name, base[name.removeprefix("llm.")], torch.float16)
        apart = ours.view(torch.int16).int() - theirs.view(torch.int16).int()
        assert ((apart.abs() <= 1) | (ours == theirs)).all(), name
    for name, tensor in adapter.projector().items():
        assert torch.equal(tensor.half(), merged[name.replace("projector.", "model.mm_projector.")]), name


def test_peft_takes_what_is_written_for_the_decoder(tiny, tmp_path):
    peft = pytest.importorskip("peft")
    import transformers

    state = factors(tiny)
    write_adapter(tmp_path / "it", "llava", lora(dropout=0.0), state, torch.float32, base=str(tiny.llm))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny.llm)
    weights = {name: weight.clone() for name, weight in plain.state_dict().items()}
    model = peft.PeftModel.from_pretrained(plain, tmp_path / "it")
    live = {name: tensor for name, tensor in model.named_parameters() if ".lora_" in name}
    assert len(live) == 28
    assert equal({name.replace("base_model.model.", "llm.").replace(".default", ""): tensor for name, tensor in live.items()}, state)
    merged = model.merge_and_unload().state_dict()
    low = LowRank(2.0, state, "")
    for name, weight in weights.items():
        torch.testing.assert_close(low.merged(f"llm.{name}", weight, torch.float32), merged[name], rtol=1e-6, atol=1e-6)
