"""What a run with adapters leaves, and what goes on from it: the original's four files, merged, exported, answered with."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_trace import config_of as golden_config
from parallel_runs import launch
from safetensors.torch import load_file, save_file
from small_world import small_config

from fastllava.config import TARGETS, check_config
from fastllava.data.loader import Sample, pack
from fastllava.errors import UserError
from fastllava.evaluate.checkpoint import load_trained
from fastllava.export import export
from fastllava.export.subject import find_subject, load_subject
from fastllava.model.execution import Execution
from fastllava.model.llava import normalise
from fastllava.model.ops import reference_ops
from fastllava.model.weights import load_llava, read_adapter
from fastllava.train import run
from fastllava.train.metrics.log import read_metrics

LORA = {"rank": 3, "alpha": 6.0, "dropout": 0.1}
FILES = ["adapter_config.json", "adapter_model.safetensors", "config.json", "non_lora_trainables.bin"]


def config_of(world, out, **sections):
    lora = {**LORA, **sections.pop("lora", {})}
    train = {"max_steps": 3, "checkpoint_steps": 2, **sections.pop("train", {})}
    return small_config(world, out, "finetune", lora=lora, train=train, **sections)


@pytest.fixture(scope="module")
def done(world, tmp_path_factory) -> Path:
    """The output_dir of a short run with adapters."""
    out = tmp_path_factory.mktemp("lora") / "run"
    run(check_config(config_of(world, out)))
    return out


def trainers_model(folder):
    """The model as training computes it, its adapters beside the weights."""
    config = check_config(json.loads((folder / "run_config.json").read_text()))
    config = config.model_copy(update={"model": config.model.model_copy(update={"adapter": folder, "projector": None})})
    return load_llava(config.model, Execution(reference_ops(), torch.float32), 0, config.lora)


def asked(model):
    """A prompt with a picture: ids, pixels, and the logits of `model`."""
    size = model.spec.size
    image = np.random.default_rng(3).integers(0, 256, (3, size, size), np.uint8)
    ids = [1, 40, -200, 50, 60, 70, 35]
    with torch.no_grad():
        logits = model.logits(pack([Sample(np.array(ids, np.int32), np.zeros((0, 2), np.int32), [image], 1.0)], model.spec, 100))
    return ids, image, logits


def test_a_run_leaves_the_originals_four_files(done, larger):
    written = sorted(path.name for path in done.iterdir() if path.suffix in (".safetensors", ".bin") or path.name in FILES)
    assert written == FILES
    adapter = read_adapter(done, "CHECKPOINT")
    assert (adapter.rank, adapter.alpha, adapter.dropout, adapter.targets) == (3, 6, 0.1, TARGETS)
    theirs = larger / "lora" / "adapter"
    names = {name.replace("layers.2.", "layers.1.") for name in load_file(theirs / "adapter_model.safetensors")}
    assert load_file(done / "adapter_model.safetensors").keys() == names
    expected = torch.load(theirs / "non_lora_trainables.bin", weights_only=True)
    assert torch.load(done / "non_lora_trainables.bin", weights_only=True).keys() == expected.keys()
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (done, theirs))
    # What the two LLMs' own files say differs.
    assert original.keys() - config.keys() <= {"attention_bias", "attention_dropout", "pretraining_tp", "use_cache"}
    assert (config["model_type"], config["architectures"]) == ("llava_llama", ["LlamaForCausalLM"])
    summary = json.loads((done / "run_summary.json").read_text())
    assert sorted(summary["result"]) == FILES


def test_the_run_and_its_checkpoint_are_merged_to_what_training_computes(done):
    ours = asked(trainers_model(done))[2]
    for folder in (done, sorted(done.glob("checkpoint-*"))[-1]):
        merged = load_subject(find_subject(folder, lambda line: None), lambda line: None)
        torch.testing.assert_close(asked(merged)[2], ours, rtol=1e-5, atol=1e-5)
    early = load_subject(find_subject(done / "checkpoint-2", lambda line: None), lambda line: None)
    assert (asked(early)[2] - ours).abs().max() > 1e-3


def test_a_run_is_merged_in_fp16_into_the_model_that_it_began_with_alone(done, world, tmp_path):
    """Hashes of that model are of weights in the dtype that the run read them in, which is no fp16."""
    export(done, "llava", tmp_path / "llava-fp16", lambda line: None, merge="fp16")
    written, base = load_file(tmp_path / "llava-fp16" / "model.safetensors"), load_file(world / "llm" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}
    assert torch.equal(written["model.embed_tokens.weight"], base["model.embed_tokens.weight"].half())
    other = shutil.copytree(world / "llm", tmp_path / "other")
    save_file(
        {**base, "model.embed_tokens.weight": base["model.embed_tokens.weight"] + 1e-3}, other / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match=r"CHECKPOINT: it was trained on another model: model\.llm: its weights are not those"):
        export(done, "llava", tmp_path / "llava-other", lambda line: None, merge="fp16", base=other)


@pytest.mark.parametrize("layout", ["hf", "peft"])
def test_transformers_and_peft_compute_what_training_does(golden, tmp_path, layout):
    peft = pytest.importorskip("peft")
    import transformers

    config = {**golden_config("finetune", golden, tmp_path / "golden", max_steps=3), "lora": LORA}
    run(check_config(config))
    ours = trainers_model(tmp_path / "golden" / "run")
    ids, image, expected = asked(ours)
    export(tmp_path / "golden" / "run", layout, tmp_path / "out", lambda line: None)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / ("out" if layout == "hf" else "out/base"))
    config = theirs.config
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "out").eval() if layout == "peft" else theirs.eval()
    given = [token for i in ids for token in ([config.image_token_index] * config.image_seq_length if i == -200 else [i])]
    pixels = normalise(torch.from_numpy(image)[None], torch.tensor(ours.spec.mean), torch.tensor(ours.spec.std))
    with torch.no_grad():
        found = model(input_ids=torch.tensor([given]), pixel_values=pixels).logits[0, :, : expected.shape[1]]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_answers_come_from_the_adapters_and_a_moved_base_is_named(done, world, tmp_path):
    trained = load_trained(done, precision="fp32")
    assert (trained.name, trained.image_policy, trained.form.name) == ("run", "pad", "v1")
    away = tmp_path / "away"
    shutil.copytree(done, away)
    values = json.loads((away / "run_config.json").read_text())
    values["model"]["llm"] = str(tmp_path / "gone")
    (away / "run_config.json").write_text(json.dumps(values))
    with pytest.raises(
        UserError, match=r"^CHECKPOINT: .*away was trained from '.*gone', which is in none of .*; name its folder with --base DIR"
    ):
        load_trained(away)
    assert load_trained(away, precision="fp32", base=world / "llm").identity == trained.identity
    other = tmp_path / "other"
    shutil.copytree(world / "llm", other)
    weights = load_file(other / "model.safetensors")
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"trained on another model: model\.llm: its weights are not those that the run began with"):
        load_trained(away, base=other)


@pytest.mark.exhaustive
def test_vllm_gets_the_merged_model_and_a_report_is_written(golden, tmp_path):
    from fastllava.evaluate.engines.vllm_engine import hf_folder
    from fastllava.evaluate.report.write import write_report

    run(check_config({**golden_config("finetune", golden, tmp_path / "golden", max_steps=1), "lora": LORA}))
    out = tmp_path / "golden" / "run"
    folder = hf_folder(load_trained(out, precision="fp32"), lambda line: None)
    assert folder != out
    assert (folder / "model.safetensors").is_file()
    page = write_report(out, None).read_text()
    assert "lora.rank" in page


def test_a_run_goes_on_from_adapters_that_agree_with_it(done, world, tmp_path):
    there = {"adapter": str(done), "projector": None}
    run(check_config(config_of(world, tmp_path / "more", model=there, train={"max_steps": 1})))
    # Step 0 runs at rate 0, so what is left is what it began with.
    for name in ("adapter_model.safetensors",):
        before, after = load_file(done / name), load_file(tmp_path / "more" / name)
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    for lora, words in (
        ({"rank": 4}, r"^lora\.rank: 4, and the adapters of model\.adapter .* have 3; write lora\.rank=3$"),
        ({"alpha": 9.0}, r"^lora\.alpha: 9, and .* have 6; write lora\.alpha=6$"),
        ({"targets": ["q_proj", "v_proj"]}, r"^lora\.targets: \[q_proj,v_proj\], and .*write lora\.targets=\[q_proj,k_proj,v_proj,"),
    ):
        with pytest.raises(UserError, match=words):
            run(check_config(config_of(world, tmp_path / "refused", model=there, lora=lora)))
    both = {"adapter": str(done), "projector": str(done / "non_lora_trainables.bin")}
    with pytest.raises(UserError, match=r"^model\.projector: .*, and the projector that was trained with .*; write model\.projector=null"):
        run(check_config(config_of(world, tmp_path / "refused", model=both)))


def test_a_lost_result_is_written_again_and_another_adapter_is_another_run(done, world, tmp_path):
    config = config_of(world, tmp_path / "run", model={"adapter": str(done), "projector": None})
    run(check_config(config))
    before = {name: (tmp_path / "run" / name).read_bytes() for name in FILES}
    (tmp_path / "run" / FILES[1]).unlink()
    run(check_config(config))
    assert {name: (tmp_path / "run" / name).read_bytes() for name in FILES[:3]} == {name: before[name] for name in FILES[:3]}
    shutil.copytree(done, tmp_path / "copy")
    config["model"]["adapter"] = str(tmp_path / "copy")
    with pytest.raises(UserError, match=r"holds a run of another training: model\.adapter was .* and is now"):
        run(check_config(config))


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", ["hf", "llava", "peft"])
def test_a_run_in_bf16_goes_into_every_layout(golden, tmp_path, layout):
    out = tmp_path / "llava-lora"
    config = {**golden_config("finetune", golden, tmp_path / "golden", max_steps=2, precision="bf16"), "lora": LORA}
    run(check_config(config | {"output_dir": str(out)}))
    assert {tensor.dtype for tensor in read_adapter(out, "CHECKPOINT").tensors().values()} == {torch.bfloat16}
    said = []
    export(out, layout, tmp_path / "out", said.append)
    assert any("read back bit for bit" in line for line in said)


def test_without_lora_adapters_are_merged_and_all_trains(done, world, tmp_path):
    config = small_config(world, tmp_path / "run", "finetune", model={"adapter": str(done), "projector": None}, train={"max_steps": 1})
    run(check_config(config))
    merged = load_subject(find_subject(done, lambda line: None), lambda line: None).state_dict()
    left = load_subject(find_subject(tmp_path / "run", lambda line: None), lambda line: None).state_dict()
    assert all(torch.equal(tensor, left[name]) for name, tensor in merged.items())


@pytest.mark.exhaustive
def test_two_processes_leave_the_same_four_files(done, world, tmp_path):
    launch(2, [(config_of(world, tmp_path / "two"), None)], tmp_path / "log")
    for name in FILES[:1] + FILES[2:3]:
        assert (tmp_path / "two" / name).read_text() == (done / name).read_text()
    ours, theirs = (load_file(folder / FILES[1]) for folder in (done, tmp_path / "two"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["lora", "task_lora"])
def test_the_originals_runs_are_repeated_from_their_first_adapters(larger, tmp_path, name):
    """With what the original drew before step 0 as model.adapter."""
    lora, trace = larger / "lora", larger / "trace"
    recorded = json.loads((lora / f"trace_{name}.json").read_text())["steps"]
    records = {
        r["id"]: r for r in json.loads(((lora / "task_records.json") if name == "task_lora" else trace / "finetune.json").read_text())
    }
    (tmp_path / "records.json").write_text(json.dumps([records[i] for step in recorded for i in step["ids"]]))
    theirs = lora / name.replace("lora", "adapter")
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copyfile(lora / f"init_{name}.safetensors", begun / "adapter_model.safetensors")
    shutil.copyfile(theirs / "adapter_config.json", begun / "adapter_config.json")
    config = {
        "stage": "finetune",
        "output_dir": str(tmp_path / "run"),
        "model": {
            "llm": str(trace / ("llm" if name == "lora" else "stage2")),
            "vision_tower": str(trace / "clip"),
            "tokenizer": str(larger.parent / "tokenizer" / "tokenizer.model"),
            "adapter": str(begun),
        },
        "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.0},
        "data": {
            "records": str(tmp_path / "records.json"),
            "images": str(trace / "images"),
            "shuffle": False,
            "legacy": False,
            "workers": 0,
        },
        "optim": {"max_grad_norm": 1.0, "lr": 2e-3, "projector_lr": 2e-4},
        "train": {"global_batch": 8, "reference_micro_batch": 8, "precision": "fp32", "loss_norm": "llava"},
    }
    run(check_config(config))
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == len(recorded)
    for row, step in zip(rows, recorded, strict=True):
        assert row["loss"] == pytest.approx(step["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-4)
    for read in (lambda folder: load_file(folder / FILES[1]), lambda folder: torch.load(folder / FILES[3], weights_only=True)):
        found, expected = read(tmp_path / "run"), read(theirs)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert found[key].shape == tensor.shape
            error = (found[key].double() - tensor.double()).norm() / tensor.double().norm().clamp_min(1e-30)
            assert error <= 1e-4, f"{key}: {error}"
