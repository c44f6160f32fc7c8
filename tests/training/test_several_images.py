"""Records of several pictures, from prepare over a resumed run to an export: equal to transformers, answered, shown and certified."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from fastllava.batch import IMAGE_ID
from fastllava.certify.run import certify
from fastllava.config import ModelConfig, check_config
from fastllava.data.checks import check_record
from fastllava.data.conversation import segments, template
from fastllava.data.loader import pack, read_sample
from fastllava.data.prepared_set import PreparedSet
from fastllava.evaluate.answer import answer_questions
from fastllava.evaluate.checkpoint import load_trained
from fastllava.evaluate.questions import read_questions
from fastllava.evaluate.report.write import write_report
from fastllava.export import export
from fastllava.model.execution import Execution
from fastllava.model.llava import normalise
from fastllava.model.ops import reference_ops
from fastllava.model.weights import load_llava
from fastllava.model.weights.layouts import to_ours
from fastllava.train import run
from fastllava.train.dataset import prepare_data
from fastllava.train.metrics.log import read_metrics
from fastllava.train.samples import find_asked

PATCHES = 4


def turns(*pairs):
    return [{"from": role, "value": text} for pair in pairs for role, text in zip(("human", "gpt"), pair, strict=True)]


@pytest.fixture(scope="module")
def records(world, tmp_path_factory) -> list[dict]:
    """Records of 0 to 3 pictures, in one turn and in several."""
    found = []
    for i in range(8):
        one, two, three = (f"{(i + k) % 24}.png" for k in range(3))
        found += [
            {"id": f"two{i}", "image": [one, two], "conversations": turns(("Is <image> like <image>?", "a red wall"))},
            {
                "id": f"three{i}",
                "image": [three, one, two],
                "conversations": turns(("<image>\n<image>\nWhich colour?", "blue"), ("And <image>", "green")),
            },
            {"id": f"one{i}", "image": one, "conversations": turns(("Which colour?\n<image>", "white"))},
            {"id": f"none{i}", "conversations": turns(("Count to 2.", "0 1 2"))},
        ]
    return found


@pytest.fixture(scope="module")
def llm(world, tmp_path_factory) -> Path:
    """A Llama whose tokenizer leaves text as it is, so that an export can hold it as a tokenizer.json."""
    folder = tmp_path_factory.mktemp("llm")
    sentencepiece.SentencePieceTrainer.train(
        input=str(world / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text((world / "llm" / "tokenizer_config.json").read_text())
    vocab = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=vocab, tie_word_embeddings=False, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def configured(records, llm, settings, tmp_path):
    """`configured(name, **sections)`: the config of a run on these records in the folder `name`."""
    (tmp_path / "records.json").write_text(json.dumps(records))

    def make(name="run", **sections):
        data = {"records": str(tmp_path / "records.json"), "max_images": 3, **sections.pop("data", {})}
        train = {"max_steps": 4, "checkpoint_steps": 2, **sections.pop("train", {})}
        parts = {"data": data, "train": train, "model": {"llm": str(llm)}, **sections}
        return check_config(settings("finetune", output_dir=str(tmp_path / name), **parts))

    return make


def train(config):
    run(config, Console(quiet=True))
    return config


def losses(config):
    return [row["loss"] for row in read_metrics(config.output_dir)]


def prepared_of(config) -> PreparedSet:
    return PreparedSet.open(Path(json.loads((config.output_dir / "run_summary.json").read_text())["prepared"]))


def test_ids_logits_loss_and_gradients_are_those_of_transformers(configured, records, world, tmp_path):
    config = train(configured())
    prepared = prepared_of(config)
    assert prepared.n_images.tolist() == [2, 3, 1, 0] * 8
    export(config.output_dir, "hf", tmp_path / "hf", lambda line: None)
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "hf", use_fast=False)
    ours = load_llava(ModelConfig(llm=tmp_path / "hf"), Execution(reference_ops(), torch.float32), 0)
    image = theirs.config.image_token_index
    samples = [read_sample(prepared, ours.spec, config.data, index, 0.0) for index in range(4)]

    rows, labels, pixels = [], [], []
    for record, sample in zip(records, samples, strict=False):
        written = "".join(part.text for part in segments(check_record(record, 0, 3), template("v1")))
        names = record.get("image", [])
        pictures = [Image.open(world / "images" / name).convert("RGB") for name in ([names] if isinstance(names, str) else names)]
        inputs = processor(text=written, images=pictures or None, return_tensors="pt")
        row = inputs["input_ids"][0].tolist()
        # The same prompt: their processor makes the same ids of its text, and of the files the same pixels.
        ids = sample.ids.tolist()
        assert row == [token for i in ids for token in ([image] * PATCHES if i == IMAGE_ID else [i])]
        marked = [-100] * len(ids)
        for begin, end in sample.supervised.tolist():
            marked[begin:end] = ids[begin:end]
        rows.append(row)
        labels.append([label for i, mark in zip(ids, marked, strict=True) for label in ([-100] * PATCHES if i == IMAGE_ID else [mark])])
        if pictures:
            pixels.append(inputs["pixel_values"])
    shown = torch.cat(pixels)
    mine = torch.stack([torch.from_numpy(picture) for sample in samples for picture in sample.images])
    mean, std = torch.tensor(ours.spec.mean), torch.tensor(ours.spec.std)
    torch.testing.assert_close(shown, normalise(mine, mean, std), rtol=0, atol=1e-5)

    longest = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    targets = torch.tensor([row + [-100] * (longest - len(row)) for row in labels])[:, 1:]
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    # Behind the tokens theirs has rows for its mark of images, which no text becomes.
    logits = theirs(input_ids=padded, attention_mask=mask, pixel_values=shown).logits[..., : ours.llm.config.vocab_size]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
    expected.backward()

    weight = 1 / int((targets != -100).sum())
    batch = pack([read_sample(prepared, ours.spec, config.data, index, weight) for index in range(4)], ours.spec, 2048)
    with torch.no_grad():
        found = ours.logits(batch).split(batch.cu_seqlens.diff().tolist())
    for index, its in enumerate(found):
        torch.testing.assert_close(its, logits[index, : len(rows[index])].detach(), rtol=0, atol=1e-4)
    loss = ours(batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters() if not name.startswith("tower.")}
    compared = set()
    for name, parameter in theirs.named_parameters():
        if (known := to_ours(name, "hf")) in gradients:
            difference = (gradients[known] - parameter.grad[: len(gradients[known])]).norm()
            assert difference <= 1e-5 * parameter.grad.norm() + 1e-8, known
            compared.add(known)
    assert compared == gradients.keys()


def test_a_run_goes_on_bit_for_bit_and_any_packing_is_the_same_training(configured):
    first = train(configured())
    before, rows = (first.output_dir / "model.safetensors").read_bytes(), losses(first)
    assert rows[-1] < rows[0]
    (first.output_dir / "run_summary.json").unlink()
    shutil.rmtree(first.output_dir / "checkpoint-4")
    assert (train(configured()).output_dir / "model.safetensors").read_bytes() == before
    for name, tokens in (("small", 60), ("large", 4000)):
        assert losses(train(configured(name, train={"micro_batch_tokens": tokens}))) == pytest.approx(rows, rel=1e-5)
    counted = [row["samples"] for row in read_metrics(first.output_dir)]
    assert counted == [4] * 4


def test_it_is_certified(configured):
    certificate = certify(configured(), lambda line: None, n_samples=4, n_steps=1)
    assert certificate.holds, certificate.verdict()


def test_a_sample_with_one_bad_picture_is_set_aside_as_a_whole(configured, world, tmp_path, monkeypatch):
    images = shutil.copytree(world / "images", tmp_path / "images")
    data = {"images": str(images), "shuffle": False, "group_by_modality": False, "max_quarantined_share": 0.5}
    config = train(configured("whole", data=data))
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:-30])
    config = configured("bad", data=data)
    kept = prepared_of(config.model_copy(update={"output_dir": tmp_path / "whole"}))
    monkeypatch.setattr("fastllava.train.dataset.prepare", lambda *_, **__: kept)
    train(config)
    aside = [json.loads(line) for line in (config.output_dir / "set_aside.jsonl").read_text().splitlines()]
    assert {entry["id"] for entry in aside} == {"two0", "three0", "two1", "three1", "one1"}
    assert next(entry for entry in aside if entry["id"] == "three0")["image"] == ["2.png", "0.png", "1.png"]


def test_questions_about_several_are_answered_and_the_report_shows_all(configured, world, tmp_path):
    asked = [
        {"question_id": "placed", "text": "Is <image> like <image>?", "image": ["1.png", "2.png"]},
        {"question_id": "before", "text": "Which colour?", "image": ["1.png", "2.png", "3.png"]},
        {"question_id": "one", "text": "Which colour?", "image": "1.png"},
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    config = train(configured(eval={"samples": str(tmp_path / "asked.jsonl"), "max_new_tokens": 6, "every_steps": 4}))
    rows = map(json.loads, (config.output_dir / "metrics.jsonl").read_text().splitlines())
    samples = [row["samples"] for row in rows if isinstance(row.get("samples"), list)][-1]
    assert [row["image"] for row in samples] == [row["image"] for row in asked]

    trained = load_trained(config.output_dir, precision="fp32")
    answer_questions(trained, read_questions(tmp_path / "asked.jsonl", world / "images"), tmp_path / "a.jsonl", max_new_tokens=6)
    answers = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert answers[0] == samples[0]["answer"]
    assert answers[1] == samples[1]["answer"]

    page = write_report(config.output_dir, None).read_text()
    assert "with several pictures" in page
    shown = page.count("<img ")
    # Of eight records from all over the set, and of three questions, each picture.
    assert shown >= 6 + 8


def test_a_first_question_shows_its_own_pictures_alone(configured, records):
    config = configured(eval={"samples": 32})
    tokenizer, spec, prepared = prepare_data(config, lambda line: None)
    asked = {one.id: one for one in find_asked(config, tokenizer, spec, prepared, None)}
    shown = {name: asked[name].images for name in ("two0", "three0", "one0", "none0")}
    assert shown == {"two0": ("0.png", "1.png"), "three0": ("2.png", "0.png"), "one0": ("0.png",), "none0": ()}
    for index, name in enumerate(("two0", "three0", "one0", "none0")):
        row = prepared.row(index)
        assert row.id == name
        # The prompt is the record up to its first answer.
        assert row.ids.tolist()[: len(asked[name].ids)] == asked[name].ids
