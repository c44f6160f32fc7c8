"""Adapters as CHECKPOINT: found, merged, exported whole and for PEFT; a base that is not there is one line that says how to name it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastllava.config import TARGETS, LoraConfig
from fastllava.errors import UserError
from fastllava.export import export
from fastllava.export.subject import find_subject, load_subject
from fastllava.model.weights.adapter_writing import write_adapter
from fastllava.model.weights.adapters import read_adapter

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.05)


@pytest.fixture(scope="module")
def world(golden, tmp_path_factory):
    """A folder with the tiny `llm`, `clip`, whole `llava` and `hf`, and adapters `mine` on llm, `task` on llava."""
    root = tmp_path_factory.mktemp("adapters")
    shutil.copytree(golden / "trace" / "stage2", root / "llava")
    for name in ("clip", "llm"):
        shutil.copytree(golden / "trace" / name, root / name)
    for name in ("llava", "llm"):
        shutil.copyfile(golden / "tokenizer" / "tokenizer.model", root / name / "tokenizer.model")
        shutil.copyfile(golden / "trace" / "llm" / "tokenizer_config.json", root / name / "tokenizer_config.json")
    export(root / "llava", "hf", root / "hf", lambda line: None)
    config = json.loads((root / "llava" / "config.json").read_text())
    weights = load_file(root / "llava" / "model.safetensors")
    state, generator = {}, torch.Generator().manual_seed(3)
    for name, weight in weights.items():
        leaf = name.split(".")[-2]
        if leaf in TARGETS and name.startswith("model.layers."):
            out, wide = weight.shape
            state[f"llm.{name.replace('.weight', '.lora_A.weight')}"] = torch.randn(4, wide, generator=generator) * 0.2
            state[f"llm.{name.replace('.weight', '.lora_B.weight')}"] = torch.randn(out, 4, generator=generator) * 0.2
        elif "mm_projector" in name:
            state[name.replace("model.mm_projector.", "projector.")] = torch.randn(weight.shape, generator=generator) * 0.2
    for name, base in (("mine", "llm"), ("task", "llava")):
        write_adapter(root / name, "llava", LORA, state, torch.float32, base=f"./{base}", config=config)
    write_adapter(root / "peft", "hf", LORA, state, torch.float32, base=str(root / "hf"))
    return root


def merged(world, base, name):
    """What merging gives, in fp64, by the original's names."""
    adapter = read_adapter(world / name, "CHECKPOINT")
    tensors, whole = adapter.tensors(), load_file(world / base / "model.safetensors")
    for key, weight in whole.items():
        a = tensors.get(f"llm.{key.replace('.weight', '.lora_A.weight')}")
        if a is not None:
            b = tensors[f"llm.{key.replace('.weight', '.lora_B.weight')}"]
            whole[key] = weight.double() + 2 * b.double() @ a.double()
    return whole | {key.replace("projector.", "model.mm_projector."): tensor for key, tensor in adapter.projector().items()}


@pytest.mark.parametrize(("name", "base"), [("mine", "llm"), ("task", "llava")])
def test_adapters_are_merged_into_the_base_beside_them(world, tmp_path, name, base):
    said = []
    export(world / name, "llava", tmp_path / "llava-out", said.append)
    assert f"holds adapters of rank 4 on {world}/{base}" in said[0].replace("./", "")
    found = load_file(tmp_path / "llava-out" / "model.safetensors")
    for key, expected in merged(world, base, name).items():
        torch.testing.assert_close(found[key].double(), expected.double(), rtol=1e-6, atol=1e-6)
    assert found["model.norm.weight"].dtype == torch.float32


def test_merging_in_fp16_leaves_all_else_rounded_alone(world, tmp_path):
    export(world / "task", "llava", tmp_path / "llava-out", merge="fp16")
    found, base = load_file(tmp_path / "llava-out" / "model.safetensors"), load_file(world / "llava" / "model.safetensors")
    tensors = read_adapter(world / "task", "CHECKPOINT").tensors()
    for key, weight in base.items():
        a = tensors.get(f"llm.{key.replace('.weight', '.lora_A.weight')}")
        if a is not None:
            b = tensors[f"llm.{key.replace('.weight', '.lora_B.weight')}"]
            theirs = weight.half() + (2 * (b.half().float() @ a.half().float())).half()
            assert torch.equal(found[key], theirs), key
        elif "mm_projector" not in key:
            assert torch.equal(found[key], weight.half()), key


@pytest.mark.parametrize("name", ["mine", "task", "peft"])
def test_every_kind_of_adapters_gives_a_whole_model_for_transformers(world, tmp_path, name):
    said = []
    export(world / name, "hf", tmp_path / "out", said.append)
    assert any("loads it with no missing and no unexpected key" in line for line in said)


def logits(model, config, ids, pixels):
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits


@pytest.mark.parametrize("name", ["mine", "task", "peft"])
def test_peft_loads_exported_adapters_and_computes_what_we_do(world, tmp_path, name):
    peft = pytest.importorskip("peft")
    import transformers

    out, said = tmp_path / "out", []
    export(world / name, "peft", out, said.append)
    assert any("load it; logits differ from ours by" in line for line in said)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == rf".*language_model.*\.({'|'.join(TARGETS)})"
    assert config["modules_to_save"] == ["multi_modal_projector"]
    base = world / "hf" if name == "peft" else out / "base"
    assert config["base_model_name_or_path"] == str(base)
    assert (out / "base").exists() == (name != "peft")
    plain = transformers.LlavaForConditionalGeneration.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(plain, out).eval()
    names = {key for key, _ in model.named_parameters() if ".lora_" in key}
    if name != "peft":
        # Moved as a whole, it is found again.
        shutil.copytree(out, tmp_path / "moved")
        (out / "base").rename(tmp_path / "aside")
        assert find_subject(tmp_path / "moved", lambda line: None).model.llm == tmp_path / "moved" / "base"
    assert len(names) == 2 * 7 * plain.config.text_config.num_hidden_layers
    assert not any("vision_tower" in key or "projector" in key for key in names)
    # Against the whole model that we write, and after PEFT's own merge.
    export(world / name, "hf", tmp_path / "whole", lambda line: None)
    whole = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "whole").eval()
    image = plain.config.image_token_index
    ids = torch.tensor([[1, 5, *[image] * plain.config.image_seq_length, 9, 20, 31]])
    pixels = torch.randn(
        1, 3, plain.config.vision_config.image_size, plain.config.vision_config.image_size, generator=torch.Generator().manual_seed(1)
    )
    ours, theirs = (logits(each, plain.config, ids, pixels) for each in (whole, model))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5 * float(ours.abs().max()))
    united = logits(model.merge_and_unload(), plain.config, ids, pixels)
    torch.testing.assert_close(united, ours, rtol=0, atol=1e-5 * float(ours.abs().max()))


@pytest.mark.parametrize("rooted", [False, True])
def test_what_peft_trained_on_llava_hf_computes_the_same_here(world, tmp_path, rooted):
    peft = pytest.importorskip("peft")
    import transformers

    plain = transformers.LlavaForConditionalGeneration.from_pretrained(world / "hf")
    wanted = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=rooted,
        init_lora_weights=False,
        target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)",
        modules_to_save=["multi_modal_projector"],
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(plain, wanted).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs", "CHECKPOINT")
    assert (adapter.rank, adapter.targets, len(adapter.projector())) == (3, ("q_proj", "v_proj", "down_proj"), 4)
    export(tmp_path / "theirs", "hf", tmp_path / "whole", lambda line: None)
    whole = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "whole").eval()
    image, side = plain.config.image_token_index, plain.config.vision_config.image_size
    ids = torch.tensor([[1, 5, *[image] * plain.config.image_seq_length, 9, 20, 31]])
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    theirs, ours = (logits(each, plain.config, ids, pixels) for each in (model, whole))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_adapters_that_peft_put_on_the_tower_too_are_refused(world, tmp_path):
    peft = pytest.importorskip("peft")
    import transformers

    plain = transformers.LlavaForConditionalGeneration.from_pretrained(world / "hf")
    peft.get_peft_model(plain, peft.LoraConfig(target_modules=["q_proj", "v_proj"])).save_pretrained(tmp_path / "theirs")
    with pytest.raises(
        UserError, match=r"adapts the vision tower \(\S+\), and only q_proj, .* of the decoder are computed; merge it into its base"
    ) as error:
        find_subject(tmp_path / "theirs", lambda line: None)
    assert "\n" not in str(error.value)
    # The remedy.
    model = peft.PeftModel.from_pretrained(transformers.LlavaForConditionalGeneration.from_pretrained(world / "hf"), tmp_path / "theirs")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    load_subject(find_subject(tmp_path / "merged", lambda line: None), lambda line: None)


def test_a_base_that_is_not_there_is_named_by_an_option_that_works(world, tmp_path):
    away = tmp_path / "elsewhere" / "adapters"
    shutil.copytree(world / "mine", away)
    config = json.loads((away / "config.json").read_text())
    (away / "config.json").write_text(json.dumps({**config, "mm_vision_tower": str(world / "clip")}))
    with pytest.raises(
        UserError, match=r"^CHECKPOINT: .* was trained from './llm', which is in none of .*; name its folder with --base DIR$"
    ):
        find_subject(away, lambda line: None)
    subject = find_subject(away, lambda line: None, world / "llm")
    there = load_subject(find_subject(world / "mine", lambda line: None), lambda line: None)
    again = load_subject(subject, lambda line: None)
    assert all(torch.equal(a, b) for a, b in zip(there.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(UserError, match=r"^--base: .*/nothing holds no config\.json; give the folder of the model that"):
        find_subject(away, lambda line: None, tmp_path / "nothing")
    with pytest.raises(UserError, match=r"^--base: .*/llava holds a whole model, which needs no other; leave --base out"):
        find_subject(world / "llava", lambda line: None, world / "llm")
    other = tmp_path / "other"
    shutil.copytree(world / "llm", other)
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**fields, "intermediate_size": 24}))
    with pytest.raises(UserError, match=r"adapts llm\.model\.layers\.0\.mlp\S+ \[\d+, \d+\], and model\.llm .*/other has \["):
        load_subject(find_subject(away, lambda line: None, other), lambda line: None)


def test_what_adapters_lack_is_said(world, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(world / "mine", bare)
    (bare / "non_lora_trainables.bin").unlink()
    with pytest.raises(UserError, match=r"holds no projector, and its base .* is an LLM alone; put the non_lora_trainables\.bin of"):
        find_subject(bare, lambda line: None, world / "llm")
    assert find_subject(bare, lambda line: None, world / "llava").lora == LORA
    (bare / "config.json").unlink()
    with pytest.raises(UserError, match="holds adapters of an LLM without tower and projector"):
        find_subject(bare, lambda line: None, world / "llm")
    config = json.loads((bare / "adapter_config.json").read_text())
    (bare / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(UserError, match="does not say from what model it was trained; name the folder of that with --base DIR"):
        find_subject(bare, lambda line: None)
    (bare / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}))
    with pytest.raises(UserError, match=r"with --base DIR, or download it: hf download lmsys/vicuna-7b-v1\.5 --local-dir"):
        find_subject(bare, lambda line: None)
    with pytest.raises(UserError, match=r"which holds adapters itself; merge it first \(fastllava export .* --layout llava --out DIR\)"):
        find_subject(bare, lambda line: None, world / "mine")


@pytest.fixture(scope="module")
def originals(larger, tmp_path_factory):
    """The original's LoRA folders by names of our own, and the tiny models that they were trained from."""
    root = tmp_path_factory.mktemp("originals")
    for name in ("llm", "clip", "stage2"):
        shutil.copytree(larger / "trace" / name, root / name, copy_function=shutil.copyfile)
        (root / name).chmod(0o755)
    for name in ("llm", "stage2"):
        shutil.copyfile(larger.parent / "tokenizer" / "tokenizer.model", root / name / "tokenizer.model")
    for name in ("adapter", "task_adapter"):
        shutil.copytree(larger / "lora" / name, root / name, copy_function=shutil.copyfile)
    return root


def test_the_originals_merge_is_equalled_to_one_ulp(originals, larger, tmp_path):
    export(originals / "adapter", "llava", tmp_path / "llava-out", lambda line: None, merge="fp16")
    found = load_file(tmp_path / "llava-out" / "model.safetensors")
    merged, base = load_file(larger / "lora" / "merged_fp16_linears.safetensors"), load_file(originals / "llm" / "model.safetensors")
    for name, theirs in merged.items():
        apart = found[name].view(torch.int16).int() - theirs.view(torch.int16).int()
        assert ((apart.abs() <= 1) | (found[name] == theirs)).all(), name
    for name in base.keys() - merged.keys():
        assert torch.equal(found[name], base[name].half()), name
    tower = load_file(originals / "clip" / "model.safetensors")
    held = {name.replace("model.vision_tower.vision_tower.", ""): tensor for name, tensor in found.items() if "vision_tower" in name}
    assert held
    assert all(torch.equal(tensor, tower[name].half()) for name, tensor in held.items())


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["adapter", "task_adapter"])
def test_the_originals_folders_go_into_every_layout(originals, tmp_path, name):
    base = originals / "stage2" if name == "task_adapter" else None
    for layout in ("hf", "llava", "peft"):
        said = []
        export(originals / name, layout, tmp_path / layout, said.append, base=base)
        assert any("logits" in line for line in said)


def test_a_damaged_file_is_said(world, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(world / "task", bad)
    torch.save({}, bad / "non_lora_trainables.bin")
    subject = find_subject(bad, lambda line: None, world / "llava")
    with pytest.raises(UserError, match=r"non_lora_trainables\.bin lacks .*; it holds no tensor at all; give the file of a training"):
        load_subject(subject, lambda line: None)
    tensors = load_file(bad / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, bad / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"holds NaN or infinity where it adapts llm\.model\.layers\.0\.\S+; give adapters of a training"):
        load_subject(find_subject(bad, lambda line: None, world / "llava"), lambda line: None)


def test_options_without_adapters_are_refused(world, tmp_path):
    with pytest.raises(UserError, match=r"^--merge: fp16, and .*llava holds no adapters; leave it out"):
        export(world / "llava", "hf", tmp_path / "a", merge="fp16")
    with pytest.raises(UserError, match=r"^--layout: peft, and .*llava holds no adapters; write --layout hf, or llava"):
        export(world / "llava", "peft", tmp_path / "a")
    with pytest.raises(UserError, match=r"^--merge: 'fp16' is none, and layout peft merges nothing; leave it out"):
        export(world / "mine", "peft", tmp_path / "a", merge="fp16")
    with pytest.raises(UserError, match=r"^--merge: 'bf16' is none; write fp32 or fp16"):
        export(world / "mine", "hf", tmp_path / "a", merge="bf16")
    assert not (tmp_path / "a").exists()
