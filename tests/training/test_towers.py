"""Another family with a SigLIP tower, from captions over a resumed run to exports that answer as transformers does."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoProcessor, LlavaForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from fastllava.batch import IMAGE_ID
from fastllava.certify.run import certify
from fastllava.config import ModelConfig, check_config
from fastllava.data.loader import Sample, pack
from fastllava.data.pixels import tower_pixels
from fastllava.data.prepared_set import PreparedSet
from fastllava.errors import UserError
from fastllava.export import export
from fastllava.model.execution import Execution
from fastllava.model.ops import reference_ops
from fastllava.model.weights import load_llava, read_origin
from fastllava.planner.simulate import MicroBatch, gpu_ops, simulate
from fastllava.train import run
from fastllava.train.metrics.flops import Accounting
from fastllava.train.metrics.log import read_metrics

SIDE, PATCH, PATCHES = 38, 12, 9
"""No multiple of each other, as SigLIP's 384 and 14."""
NEW = 6


@pytest.fixture(scope="module")
def parts(world, tmp_path_factory) -> dict[str, str]:
    """A Qwen2.5 and a SigLIP of random weights, as `model.llm` and `model.vision_tower`."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(1)
    (root / "llm").mkdir()
    # It leaves text as it is, so that it can be written as a tokenizer.json.
    sentencepiece.SentencePieceTrainer.train(
        input=str(world / "corpus.txt"), model_prefix=str(root / "llm" / "tokenizer"), vocab_size=400, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (root / "llm" / "tokenizer_config.json").write_text(json.dumps({"legacy": False, "tokenizer_class": "LlamaTokenizer"}))
    vocab = sentencepiece.SentencePieceProcessor(model_file=str(root / "llm" / "tokenizer.model")).vocab_size()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    qwen = Qwen2Config(vocab_size=vocab, num_hidden_layers=2, num_key_value_heads=2, tie_word_embeddings=False, **sizes)
    Qwen2ForCausalLM(qwen).save_pretrained(root / "llm")
    tower = SiglipVisionModel(SiglipVisionConfig(num_hidden_layers=3, image_size=SIDE, patch_size=PATCH, **sizes))
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tower.save_pretrained(root / "tower")
    square = {"image_processor_type": "SiglipImageProcessor", "size": {"height": SIDE, "width": SIDE}, "resample": 2}
    (root / "tower" / "preprocessor_config.json").write_text(json.dumps({**square, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return {"llm": str(root / "llm"), "vision_tower": str(root / "tower")}


@pytest.fixture
def trained(settings, parts, tmp_path):
    """`trained(stage, name, **sections)`: the config of a run in the folder `name` that is over."""

    def train(stage, name, model=None, **sections):
        sections["train"] = {"max_steps": 4, "checkpoint_steps": 2, **sections.get("train", {})}
        config = check_config(settings(stage, output_dir=str(tmp_path / name), model={**parts, **(model or {})}, **sections))
        run(config, Console(quiet=True))
        return config

    return train


def losses(config):
    return [row["loss"] for row in read_metrics(config.output_dir)]


def answer(model, ids, pixels):
    """Greedy tokens of our model."""
    found = []
    for _ in range(NEW):
        asked = np.array([*ids, *found], np.int32)
        batch = pack([Sample(asked, np.zeros((0, 2), np.int32), [pixels], 1.0)], model.spec, len(asked) + PATCHES)
        with torch.no_grad():
            found.append(int(model.logits(batch)[-1].argmax()))
    return found


@pytest.mark.parametrize("policy", ["square", "pad"])
def test_from_captions_to_answers_that_are_transformers(trained, tmp_path, policy):
    data = {"image_policy": policy}
    first = trained("pretrain", "one", data=data)
    prepared = PreparedSet.open(Path(json.loads((first.output_dir / "run_summary.json").read_text())["prepared"]))
    assert prepared.manifest["image_spec"]["patches"] == PATCHES
    assert prepared.manifest["image_spec"]["crops"] is False
    second = trained("finetune", "two", model={"projector": str(first.output_dir / "mm_projector.safetensors")}, data=data)
    assert losses(second)[-1] < losses(second)[0]

    # Killed after its second step, it goes on as if nothing had been.
    before = (second.output_dir / "model.safetensors").read_bytes()
    (second.output_dir / "run_summary.json").unlink()
    shutil.rmtree(second.output_dir / "checkpoint-4")
    again = trained("finetune", "two", model={"projector": str(first.output_dir / "mm_projector.safetensors")}, data=data)
    assert (again.output_dir / "model.safetensors").read_bytes() == before

    said = []
    export(second.output_dir, "llava", tmp_path / "a-llava", said.append)
    assert any("the original's code builds CLIP towers only, and this one is SigLIP" in line for line in said)
    export(second.output_dir, "hf", tmp_path / "hf", said.append)
    assert any("loads it with no missing and no unexpected key" in line for line in said)
    assert any("answers through generate" in line for line in said)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["vision_feature_select_strategy"] == "full"
    assert written["vision_config"]["model_type"] == "siglip_vision_model"
    assert written["image_seq_length"] == PATCHES

    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "hf", use_fast=False)
    ours = load_llava(ModelConfig(llm=tmp_path / "hf"), Execution(reference_ops(), torch.float32), 0)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 71, 3)).astype(np.uint8))
    pixels = tower_pixels(picture, policy, ours.spec)
    inputs = processor(text="USER: <image>\nWhich colour? ASSISTANT:", images=picture, return_tensors="pt")
    shown = (torch.from_numpy(pixels.copy()).float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(inputs["pixel_values"][0], shown, rtol=0, atol=1e-6)
    with torch.no_grad():
        expected = theirs.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    row = inputs["input_ids"][0].tolist()
    image = theirs.config.image_token_index
    assert row.count(image) == PATCHES
    at = row.index(image)
    asked = [*row[:at], IMAGE_ID, *row[at + PATCHES :]]
    # The end token is forbidden there, so ours must not want it for this to mean anything.
    found = answer(ours, asked, pixels)
    assert theirs.generation_config.eos_token_id not in found
    assert found == expected.tolist()

    # What was exported trains on, from either layout, with the same loss.
    starts = [second.output_dir, tmp_path / "a-llava", tmp_path / "hf"]
    model = {"projector": None, "vision_tower": None}
    started = {losses(trained("finetune", f"on-{i}", model={**model, "llm": str(start)}, data=data, train={"max_steps": 1}))[0]
               for i, start in enumerate(starts)}  # fmt: skip
    assert len(started) == 1


def test_its_certificate_holds(settings, parts):
    certificate = certify(check_config(settings("finetune", model=parts)), lambda line: None, n_samples=4, n_steps=1)
    assert certificate.holds, certificate.verdict()


def test_the_planner_and_the_count_of_operations_know_it(settings, parts):
    config = check_config(settings("pretrain", model=parts))
    origin = read_origin(config.model)
    assert origin.spec.patches == PATCHES
    size = MicroBatch(rows=200, samples=5, images=5, supervised=60, longest=40)
    assert simulate(config, origin, gpu_ops({}), size, accumulates=True).peak > 0
    tower = Accounting.of(config)._tower()
    per_block = 2 * PATCHES * (4 * 32**2 + 2 * 32 * 64) + 4 * 32 * PATCHES**2
    assert tower == 2 * PATCHES * 32 * 3 * PATCH**2 + 2 * per_block


def test_a_checkpoint_whose_projector_saw_other_rows_is_refused(trained, tmp_path):
    done = trained("finetune", "two", train={"max_steps": 1})
    export(done.output_dir, "hf", tmp_path / "hf", lambda line: None)
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vision_feature_select_strategy": "default"}))
    with pytest.raises(
        UserError, match=r"its projector gets other rows than the SigLIP tower's patches \(default\), which is not supported"
    ):
        read_origin(ModelConfig(llm=tmp_path / "hf"))
