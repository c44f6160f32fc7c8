"""Another family with a SigLIP tower, from captions over a resumed run to exports that answer as transformers does."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from parallel_runs import start
from PIL import Image
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Siglip2Config,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

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
STEPS = 40
DECODERS = {"qwen3": {"model_type": "qwen3", "head_dim": 16}, "qwen2": {"model_type": "qwen2"}}
"""Qwen3's heads are wider here than hidden_size / num_attention_heads."""


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    """`made(family)`: a decoder of that family and a SigLIP, as `model.llm` and `model.vision_tower`, made once."""
    known = {}

    def parts(family):
        if family not in known:
            known[family] = make_parts(world, tmp_path_factory.mktemp(family), **DECODERS[family])
        return known[family]

    return parts


@pytest.fixture(scope="module")
def parts(made):
    return made("qwen3")


def make_parts(world, root, **given) -> dict[str, str]:
    """Folders of a decoder and a SigLIP of random weights."""
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
    options = {"vocab_size": vocab, "num_hidden_layers": 2, "num_key_value_heads": 2, "tie_word_embeddings": False, **sizes, **given}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options))
    for name, parameter in model.named_parameters():
        # As they begin, they are ones and do nothing.
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(root / "llm")
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


def check_answers(hf, policy):
    """Whether the whole LLaVA that was exported to the folder `hf` answers as transformers does with it, token for token."""
    theirs = LlavaForConditionalGeneration.from_pretrained(hf).eval()
    processor = AutoProcessor.from_pretrained(hf, use_fast=False)
    ours = load_llava(ModelConfig(llm=hf), Execution(reference_ops(), torch.float32), 0)
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


@pytest.mark.parametrize(("family", "policy"), [("qwen3", "pad"), ("qwen2", "square")])
def test_from_captions_to_answers_that_are_transformers(trained, made, tmp_path, family, policy):
    data, parts = {"image_policy": policy}, made(family)
    first = trained("pretrain", "one", model=parts, data=data)
    prepared = PreparedSet.open(Path(json.loads((first.output_dir / "run_summary.json").read_text())["prepared"]))
    assert prepared.manifest["image_spec"]["patches"] == PATCHES
    assert prepared.manifest["image_spec"]["crops"] is False
    second = trained("finetune", "two", model={**parts, "projector": str(first.output_dir / "mm_projector.safetensors")}, data=data)
    assert losses(second)[-1] < losses(second)[0]

    # Killed after its second step, it goes on as if nothing had been.
    before = (second.output_dir / "model.safetensors").read_bytes()
    (second.output_dir / "run_summary.json").unlink()
    shutil.rmtree(second.output_dir / "checkpoint-4")
    again = trained("finetune", "two", model={**parts, "projector": str(first.output_dir / "mm_projector.safetensors")}, data=data)
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

    check_answers(tmp_path / "hf", policy)

    # What was exported trains on, from either layout, with the same loss.
    starts = [second.output_dir, tmp_path / "a-llava", tmp_path / "hf"]
    model = {"projector": None, "vision_tower": None}
    started = {losses(trained("finetune", f"on-{i}", model={**model, "llm": str(start)}, data=data, train={"max_steps": 1}))[0]
               for i, start in enumerate(starts)}  # fmt: skip
    assert len(started) == 1


@pytest.mark.exhaustive
def test_killed_in_both_stages_it_ends_with_the_same_bits_and_answers(settings, parts, tmp_path):
    def values(stage, folder, projector):
        train = {"max_steps": STEPS, "checkpoint_steps": 3, "seed": 3}
        model, data = {**parts, "projector": projector}, {"image_policy": "pad", "workers": 1}
        return settings(stage, output_dir=str(tmp_path / folder / stage), model=model, data=data, train=train, optim={"warmup_ratio": 0.0})

    ends = {}
    for folder in ("killed", "unbroken"):
        projector = "fresh"
        for stage in ("pretrain", "finetune"):
            given, out = values(stage, folder, projector), tmp_path / folder / stage
            for taken in (4, 11) if folder == "killed" else ():
                process = start(given, tmp_path / "said")
                while len(read_metrics(out)) <= taken:
                    assert process.is_alive(), (tmp_path / "said").read_text()
                    time.sleep(0.002)
                process.kill()
                process.join()
                assert process.exitcode == -signal.SIGKILL, "it was still training"
            run(check_config(given), Console(quiet=True))
            rows = [{key: row[key] for key in ("step", "loss", "grad_norm", "tokens")} for row in read_metrics(out)]
            assert len(rows) == STEPS
            (weights,) = out.glob("mm_projector.safetensors" if stage == "pretrain" else "model.safetensors")
            ends[folder, stage] = (rows, weights.read_bytes())
            projector = str(out / "mm_projector.safetensors")
    for stage in ("pretrain", "finetune"):
        assert ends["killed", stage] == ends["unbroken", stage]
    export(tmp_path / "killed" / "finetune", "hf", tmp_path / "hf", lambda line: None)
    check_answers(tmp_path / "hf", "pad")


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


@pytest.mark.parametrize("config", [Siglip2VisionConfig(), Siglip2Config(), SiglipVisionConfig()], ids=lambda config: config.model_type)
def test_naflex_is_refused_before_weights_or_records_are_read(settings, parts, tmp_path, config):
    # There are neither weights nor records, so that whoever reads them says something else.
    config.save_pretrained(tmp_path / "tower")
    values = settings("pretrain", model={**parts, "vision_tower": str(tmp_path / "tower")}, data={"records": str(tmp_path / "none.json")})
    with pytest.raises(UserError) as refused:
        run(check_config(values), Console(quiet=True))
    naflex = (
        rf"^model\.vision_tower: {tmp_path}/tower/config\.json: model_type '{config.model_type}' is a SigLIP2 of any aspect \(NaFlex\).*"
        r"; that is not supported: give a SigLIP2 of a fixed size, such as google/siglip2-so400m-patch14-384, whose model_type is siglip$"
    )
    assert bool(re.fullmatch(naflex, str(refused.value))) == config.model_type.startswith("siglip2"), refused.value


def test_naflex_in_a_whole_llava_is_refused_too(parts, tmp_path):
    given = LlavaConfig(vision_config=Siglip2VisionConfig(), text_config=AutoConfig.from_pretrained(parts["llm"]))
    given.save_pretrained(tmp_path / "llava")
    with pytest.raises(
        UserError, match=rf"^model\.llm: {tmp_path}/llava/config\.json: model_type 'siglip2_vision_model' is a .*\(NaFlex\)"
    ):
        read_origin(ModelConfig(llm=tmp_path / "llava"))
