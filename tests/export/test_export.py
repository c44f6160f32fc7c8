"""`fastllava export`: every kind of checkpoint in, both layouts out, read back and compared; and transformers' word on the result."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastllava.config import ModelConfig, check_config
from fastllava.errors import UserError
from fastllava.export import export
from fastllava.model.execution import Execution
from fastllava.model.llava import normalise
from fastllava.model.ops import choose_ops
from fastllava.model.weights import load_llava, read_image_spec, write_checkpoint, write_projector
from fastllava.train.state import checkpoint

OPS = choose_ops({}, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def run(golden, tmp_path_factory):
    """The original's tiny stage 2 with tokenizer and tower, as a user would have it: folders `llava`, `clip`, `llm`."""
    root = tmp_path_factory.mktemp("export")
    shutil.copytree(golden / "trace" / "stage2", root / "llava")
    for name in ("clip", "llm"):
        shutil.copytree(golden / "trace" / name, root / name)
    for name in ("llava", "llm"):
        shutil.copyfile(golden / "tokenizer" / "tokenizer.model", root / name / "tokenizer.model")
        shutil.copyfile(golden / "trace" / "llm" / "tokenizer_config.json", root / name / "tokenizer_config.json")
    return root


@pytest.fixture(scope="module")
def hf(run, tmp_path_factory):
    """The folder of `run` in layout hf, and what export said."""
    out, said = tmp_path_factory.mktemp("hf") / "out", []
    export(run / "llava", "hf", out, said.append)
    return out, said


def config_of(run, stage, **model):
    given = {"llm": str(run / "llm"), "vision_tower": str(run / "clip"), **model}
    data = {"records": "r.json", "legacy": False}
    return check_config({"stage": stage, "output_dir": "o", "model": given, "data": data, "train": {"precision": "fp32"}})


def test_export_says_what_it_checked(hf):
    out, said = hf
    text = "\n".join(said)
    assert "check: all 105 tensors read back bit for bit" in text
    assert "check: logits of a fixed image and prompt are equal after reading it back" in text
    assert "loads it with no missing and no unexpected key, and tokenizes the prompt as training does" in text
    assert "check: its logits differ from ours by" in text
    assert (out / "config.json").is_file()


def test_transformers_loads_the_hf_layout_whole(run, hf):
    import transformers

    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(hf[0], output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    original = load_file(run / "llava" / "model.safetensors")
    table = model.get_input_embeddings().weight
    old = original["model.embed_tokens.weight"]
    assert table.shape == (704, 32)
    assert torch.equal(table[:640], old)
    # New rows are defined: each the mean of the old ones.
    torch.testing.assert_close(table[640:], old.mean(0).expand(64, -1))
    torch.testing.assert_close(model.lm_head.weight[703], original["lm_head.weight"].mean(0))
    config = model.config
    assert (config.image_token_index, config.image_seq_length, config.vision_feature_layer) == (640, 16, -2)
    assert config.vision_feature_select_strategy == "default"


def test_the_processor_pads_and_tokenizes_as_training_does(run, hf, golden, tmp_path):
    import numpy as np
    import transformers
    from PIL import Image

    from fastllava.data.images import load_image
    from fastllava.data.tokenizer import Tokenizer

    processor = transformers.AutoProcessor.from_pretrained(hf[0])
    assert processor.image_processor.do_pad is True
    assert (processor.patch_size, processor.num_additional_image_tokens) == (14, 1)
    assert processor.vision_feature_select_strategy == "default"
    ids = processor.tokenizer("USER: <image>\nWhat").input_ids
    assert ids == [1, 540, 319, 566, 540, 640, 540, 13, 585, 304]
    # Text after </s> has no leading space piece here: Vicuna's tokenizer says legacy=false.
    assert processor.tokenizer("hi</s>USER: two").input_ids == [1, 332, 547, 2, 319, 566, 261, 559, 546]
    mine = Tokenizer.load(golden / "tokenizer" / "tokenizer.model", False)
    again = Tokenizer.load(hf[0])
    assert (again.legacy, again.bos_id, again.eos_id) == (False, 1, 2)
    for text in ("x\n    indented  code", "東京 ½ 🙂", "tab\tand trailing  "):
        assert processor.tokenizer(text).input_ids == [1, *mine.encode(text)] == [1, *again.encode(text)], text
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 50, 3), np.uint8))
    picture.save(tmp_path / "picture.png")
    inputs = processor(text="USER: <image>\nWhat", images=picture, return_tensors="pt")
    assert (inputs["input_ids"] == 640).sum() == 16
    config = config_of(run, "finetune", projector="fresh")
    spec = read_image_spec(config.model)
    pixels = torch.from_numpy(load_image(tmp_path / "picture.png", "pad", spec, config.data))[None]
    difference = (inputs["pixel_values"] - normalise(pixels, torch.tensor(spec.mean), torch.tensor(spec.std))).abs().max()
    # transformers 5 resizes with torchvision where that is installed, and rounds otherwise than Pillow does.
    assert difference == 0 or (difference < 0.1 and not type(processor.image_processor).__name__.endswith("Pil"))
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
    ]
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
        "answers to the user's questions. USER: <image>\nHi? ASSISTANT: Yes.</s>USER: And? ASSISTANT:"
    )


def v1_prompt(record):
    """The conversation of template v1 as one string, or None where the golden one is more than that (cut, or odd roles)."""
    text = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    text += "and polite answers to the user's questions."
    for turn, message in enumerate(record["conversations"]):
        value = message["value"]
        if "<image>" in value:
            if not record.get("image"):
                return None  # There it is text to the original, and to any tokenizer with an image token it is not.
            value = ("<image>\n" + value.replace("<image>", "").strip()).strip()
        if message["from"] != ("human", "gpt")[turn % 2] or not value:
            return None
        text += f" USER: {value}" if turn == 0 else (f"USER: {value}" if turn % 2 == 0 else f" ASSISTANT: {value}</s>")
    return text


@pytest.mark.parametrize("legacy", [False, True])
def test_the_written_tokenizer_gives_the_originals_ids_on_whole_conversations(each_golden, tmp_path, legacy):
    from tokenizers import Tokenizer

    from fastllava.model.weights.tokenizer_json import from_sentencepiece

    tokenizer = from_sentencepiece(each_golden / "tokenizer" / "tokenizer.model", {}, legacy, add_bos=True)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    image = tokenizer.token_to_id("<image>")
    records = json.loads((each_golden / "tokens" / "records.json").read_text())
    expected = json.loads((each_golden / "tokens" / "expected.json").read_text())
    wanted = {e["id"]: e["input_ids"] for e in expected if e["template"] == "v1" and e["legacy"] == legacy and "input_ids" in e}
    compared, different = 0, []
    for record in records:
        prompt = v1_prompt(record)
        ids = wanted.get(record["id"])
        if prompt is None or ids is None or len(ids) >= 2048:
            continue
        if tokenizer.encode(prompt).ids != [image if i == -200 else i for i in ids]:
            different.append(record["id"])
        compared += 1
    assert compared > 100
    assert not different


def test_round_trip_llava_hf_llava_is_bitwise(run, hf, tmp_path):
    export(hf[0], "llava", tmp_path / "llava_again", lambda line: None)
    original, again = (load_file(folder / "model.safetensors") for folder in (run / "llava", tmp_path / "llava_again"))
    assert original.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in original.items())
    config = json.loads((tmp_path / "llava_again" / "config.json").read_text())
    assert config["vocab_size"] == 640
    # The original's loader wants a folder for the tower, and gets one.
    assert config["mm_vision_tower"] == str(tmp_path / "llava_again" / "vision_tower")
    tower = load_file(tmp_path / "llava_again" / "vision_tower" / "model.safetensors")
    assert torch.equal(tower["vision_model.pre_layrnorm.bias"], original["model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias"])
    assert json.loads((tmp_path / "llava_again" / "tokenizer_config.json").read_text())["tokenizer_class"] == "LlamaTokenizer"
    export(tmp_path / "llava_again", "hf", tmp_path / "hf_again", lambda line: None)
    for path in hf[0].iterdir():
        assert (tmp_path / "hf_again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_hf_to_hf_keeps_every_tensor(hf, tmp_path):
    export(hf[0], "hf", tmp_path / "again", lambda line: None)
    before, after = (load_file(folder / "model.safetensors") for folder in (hf[0], tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_originals_checkpoint_is_written_again_bit_for_bit(run, tmp_path):
    said = []
    export(run / "llava", "llava", tmp_path / "copy", said.append)
    before, after = (load_file(folder / "model.safetensors") for folder in (run / "llava", tmp_path / "copy"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    given, written = (json.loads((folder / "config.json").read_text()) for folder in (run / "llava", tmp_path / "copy"))
    changed = {name for name in given if written.get(name) != given[name]}
    assert changed <= {"_name_or_path", "transformers_version", "mm_vision_tower"}
    assert written["mm_vision_tower"] == str(run / "clip")
    assert "'llava' in its name" in said[-1]


def test_a_stage_1_result_is_exported_with_the_model_it_was_trained_with(run, golden, tmp_path):
    config = config_of(run, "pretrain")
    folder = tmp_path / "stage1"
    folder.mkdir()
    (folder / "run_config.json").write_text(json.dumps(config.model_dump(mode="json")))
    with pytest.raises(UserError, match=r"^CHECKPOINT: the run in .* has not ended; let it end, or give one of its checkpoint-N"):
        export(folder, "hf", tmp_path / "out")
    trained = load_llava(ModelConfig(llm=run / "llm", vision_tower=run / "clip"), Execution(OPS, torch.float32), seed=3)
    write_projector(trained.projector, folder, torch.float32)
    export(folder, "hf", tmp_path / "out", lambda line: None)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["multi_modal_projector.linear_2.weight"], trained.projector.state_dict()["2.weight"])
    assert not (tmp_path / "out" / "chat_template.jinja").exists()  # The run's template is plain.
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["do_pad"] is False


def test_a_stage_2_output_dir_and_a_checkpoint_of_it_are_exported(run, tmp_path):
    config = config_of(run, "finetune", projector="fresh")
    model = load_llava(config.model, Execution(OPS, torch.float32), seed=6)
    trained = {name: p for name, p in model.named_parameters() if not name.startswith("tower.")}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.01)
    optimizer = torch.optim.AdamW(trained.values())
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    folder = checkpoint.save(tmp_path, 7, config, "digest", trained, optimizer)
    write_checkpoint(model, "llava", tmp_path, torch.float32, source=config.model, image_policy="pad", max_tokens=2048, legacy=False)
    (tmp_path / "run_config.json").write_text(json.dumps(config.model_dump(mode="json")))
    said = []
    export(folder, "llava", tmp_path / "a-llava", said.append)
    export(tmp_path, "llava", tmp_path / "b-llava", said.append)
    assert f"{folder} is a checkpoint of stage finetune" in said
    assert f"{tmp_path} is the output_dir of stage finetune" in said
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("a-llava", "b-llava"))
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    assert torch.equal(first["model.norm.weight"], trained["llm.model.norm.weight"].detach())
    assert not any("note:" in line for line in said)


def test_a_16_bit_checkpoint_keeps_its_dtype(run, tmp_path):
    folder = shutil.copytree(run / "llava", tmp_path / "half")
    shutil.copytree(run / "clip", folder / "vision_tower")
    tensors = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    export(folder, "hf", tmp_path / "out", lambda line: None)
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float16"


def test_what_cannot_be_exported_is_said_in_one_line(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "llava_llama", "mm_projector_type": "ldpnet"}')
    cases = [
        (run / "llava", "gguf", tmp_path / "new", r"^--layout: 'gguf' is no layout; write hf, llava or peft"),
        (run / "llava", "hf", tmp_path / "full", r"^--out: .*full exists and is not an empty folder; give a new one"),
        (run / "llava", "hf", tmp_path / "full" / "file", r"^--out: .*file exists and is not an empty folder"),
        (tmp_path / "nowhere", "hf", tmp_path / "new", r"^CHECKPOINT: .*nowhere is no folder; give the output_dir of a run"),
        (tmp_path / "full", "hf", tmp_path / "new", r"^CHECKPOINT: .*full holds no run_config\.json and no config\.json; give"),
        (tmp_path / "foreign", "llava", tmp_path / "new", r"^CHECKPOINT: .*config\.json has the projector 'ldpnet'; only linear, "),
        (run / "llm", "hf", tmp_path / "new", r"^CHECKPOINT: .*llm holds an LLM without tower and projector; give"),
    ]
    for given, layout, out, pattern in cases:
        with pytest.raises(UserError, match=pattern):
            export(given, layout, out)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damage", ["tensor", "logits", "tokens", "keys"])
def test_a_check_that_fails_is_an_error_and_keeps_nothing(run, tmp_path, monkeypatch, damage):
    """The written checkpoint is spoilt before it is checked; each check must see its own kind of damage."""
    import fastllava.export as module

    def spoil(*args, **kwargs):
        write_checkpoint(*args, **kwargs)
        folder = args[2]
        if damage == "tokens":
            tokenizer = json.loads((folder / "tokenizer.json").read_text())
            tokenizer["pre_tokenizer"]["prepend_scheme"] = "never"
            (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        if damage == "logits":
            config = json.loads((folder / "config.json").read_text())
            config["text_config"]["rope_theta"] = 5.0
            (folder / "config.json").write_text(json.dumps(config))
        tensors = load_file(folder / "model.safetensors")
        if damage == "tensor":
            tensors["language_model.model.norm.weight"][3] += 1e-6
        if damage == "keys":
            tensors["language_model.model.extra.weight"] = torch.ones(1)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(module, "write_checkpoint", spoil)
    words = {
        "tensor": r"tensor language_model\.model\.norm\.weight was not read back as it was written",
        "logits": r"logits of the fixed image and prompt differ after reading it back",
        "tokens": r"tokenizes the prompt to \[",
        "keys": r"tensor language_model\.model\.extra\.weight was read back and never written",
    }[damage]
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"^--out: the check of the written checkpoint failed: .*" + words):
        export(run / "llava", "hf", tmp_path / "out", lambda line: None)
    assert not list((tmp_path / "out").iterdir())
