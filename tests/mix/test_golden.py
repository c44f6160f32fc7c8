"""Boxes, ShareGPT's cleaning and ScienceQA's conversion are equal to what the original tools give."""

import json

import pytest

from fastllava.data.tokenizer import Tokenizer
from fastllava.mix import sharegpt
from fastllava.mix.boxes import Box, box_text, on_padded_square, within
from fastllava.mix.conversation import record_of
from fastllava.mix.sources.scienceqa import conversation_of
from fastllava.mix.sources.sharegpt import Rules, _kept

CODES = {"sharegpt_short": 1, "sharegpt_roles": 2, "sharegpt_blocked": 3, "sharegpt_html": 4}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_boxes_on_the_padded_square(larger):
    cases = read(larger / "mix" / "boxes" / "boxes.json")
    assert len(cases) > 10
    for case in cases:
        left, top, width, height = case["box_xywh"]
        box = within(Box(left, top, left + width, top + height), case["width"], case["height"])
        assert box is not None
        shares = on_padded_square(box, case["width"], case["height"])
        assert list(shares) == pytest.approx(case["normalised"], abs=1e-12)
        assert box_text(shares) == case["text"]


def test_cleaning_of_sharegpt(larger):
    folder = larger / "mix" / "sharegpt"
    expected, given = read(folder / "sharegpt_clean.json"), read(folder / "sharegpt_html.json")
    seen: set[bytes] = set()
    kept, codes = [], {}
    for number, sample in enumerate(given):
        turns = sharegpt.turns_of(sample["conversations"])
        name = f"{number}:{sample['id']}"
        try:
            sharegpt.cleaned(turns)
            codes[name] = 0
        except sharegpt.Left as left:
            codes[name] = CODES[left.reason]
        try:
            found = _kept(sample["id"], turns, sample.get("plugins") is not None, Rules(), seen)
        except sharegpt.Left:
            continue
        kept.append({"id": sample["id"], "conversations": [{"from": role, "value": text} for role, text in found]})
    assert codes == expected["error_codes"]
    assert kept == expected["kept"]


def test_splitting_of_sharegpt(larger):
    folder = larger / "mix" / "sharegpt"
    expected, given = read(folder / "split_expected.json"), read(folder / "split_input.json")
    tokenizer = Tokenizer.load(larger.parent / "tokenizer", legacy=True)
    lengths = {}
    for sample in given:
        texts = [turn["value"] for turn in sample["conversations"]]
        lengths[sample["id"]] = [sharegpt.turn_length(len(tokenizer.encode(text)) + 1) for text in texts]
    assert lengths == expected["turn_lengths"]
    for most, segments in expected["split"].items():
        found = []
        for sample in given:
            turns = sample["conversations"]
            for begin, end in sharegpt.split(lengths[sample["id"]], int(most)):
                if end > begin and [turn["from"] for turn in turns[begin:end]] == ["human", "gpt"] * ((end - begin) // 2):
                    name, model = sharegpt.segment_id(sample["id"], begin), sample.get("model", "")
                    ends = {"first": turns[begin]["value"][:40], "last": turns[end - 1]["value"][-40:]}
                    found.append({"id": name, "model": model, "turns": end - begin, **ends})
        assert found == segments, most


def test_cleaning_and_splitting_through_the_builder(larger, made):
    folder = larger / "mix" / "sharegpt"
    files = {name: {"conversations": str(folder / name)} for name in ("sharegpt_html.json", "split_input.json")}
    source = {"name": "s", "format": "sharegpt", "files": files["sharegpt_html.json"], "rules": {"long": "keep"}}
    assert made({"sources": [source]}, "clean")[0] == read(folder / "sharegpt_clean.json")["kept"]
    for most, segments in read(folder / "split_expected.json")["split"].items():
        rules = {"clean": False, "long": "split", "max_tokens": int(most)}
        source = {"name": "s", "format": "sharegpt", "files": files["split_input.json"], "rules": rules}
        records, _ = made({"tokenizer": str(larger.parent / "tokenizer"), "sources": [source]}, most)
        found = [(record["id"], record["model"], len(record["conversations"])) for record in records]
        assert found == [(segment["id"], segment["model"], segment["turns"]) for segment in segments]


def test_hand_written_files_of_each_public_format_are_read(larger, made):
    folder = larger / "mix" / "source_formats"
    coco = {"images": "coco/train2017"}

    def at(name: str) -> str:
        return str(folder / name)

    def vqa(begin: str) -> dict[str, str]:
        questions = f"{begin}OpenEnded_mscoco_train2014_questions.json"
        return {"questions": at(questions), "annotations": at(f"{begin}mscoco_train2014_annotations.json")}

    refs = {"refs": at("refcoco/refcoco/refs(unc).p"), "instances": at("refcoco/refcoco/instances.json")}
    texts = {"captions": at("TextCaps_0.1_train.json"), "ocr": at("TextVQA_Rosetta_OCR_v0.2_train.json")}
    genome = {"regions": at("region_descriptions.json"), "images": at("image_data.json")}
    sources = [
        {"name": "vqav2", "format": "vqav2", **coco, "files": vqa("v2_")},
        {"name": "okvqa", "format": "okvqa", **coco, "files": vqa("")},
        {"name": "aokvqa", "format": "aokvqa", **coco, "files": {"questions": at("aokvqa_v1p0_train.json")}},
        {"name": "gqa", "format": "gqa", "images": "gqa/images", "files": {"questions": at("train_balanced_questions.json")}},
        {"name": "ocr_vqa", "format": "ocr_vqa", "images": "ocr_vqa/images", "files": {"questions": at("ocrvqa_dataset.json")}},
        {"name": "textcaps", "format": "textcaps", "images": "textvqa/train_images", "files": texts},
        {"name": "refcoco", "format": "refcoco", **coco, "files": {"sets": [refs]}},
        {"name": "vg", "format": "visual_genome", "images": "vg", "files": genome},
        {"name": "lcs", "format": "llava", "files": {"records": at("blip_laion_cc_sbu_558k.json")}},
        {
            "name": "sharegpt",
            "format": "sharegpt",
            "files": {"conversations": at("sharegpt_split.json")},
            "rules": {"clean": False, "long": "keep"},
        },
    ]
    _, built = made({"sources": sources})
    found = {name: (entry["records"], entry["turns"]) for name, entry in built.report["sources"].items()}
    assert found == {
        "vqav2": (2, 6),
        "okvqa": (1, 2),
        "aokvqa": (4, 8),
        "gqa": (2, 6),
        "ocr_vqa": (1, 10),
        "textcaps": (1, 2),
        "refcoco": (1, 6),
        "vg": (1, 4),
        "lcs": (1, 2),
        "sharegpt": (1, 2),
    }
    assert (built.folder / "dropped.jsonl").read_text() == ""


def test_scienceqa_through_the_builder(larger, made):
    folder = larger / "eval" / "scorers" / "scienceqa"
    files = {"problems": str(folder / "problems.json"), "splits": str(folder / "pid_splits.json")}
    source = {"name": "s", "format": "scienceqa", "files": files, "rules": {"split": "minitest", "prompt_format": "QCM-LEA"}}
    assert made({"sources": [source]})[0] == read(folder / "converted_minitest.json")["QCM-LEA"]


def test_repeated_numbering_of_sharegpt(larger):
    for sample in read(larger / "mix" / "sharegpt" / "wrong_format.json"):
        assert sharegpt.repeats_numbering(sharegpt.turns_of(sample["conversations"])) is sample["skip"], sample["id"]


@pytest.mark.parametrize("prompt_format", ["QCM-LEA", "QCM-A", "CQM-A", "QCM-ALE", "QCML-AE", "QCME-A", "QCM-LEPA"])
def test_conversion_of_scienceqa(larger, prompt_format):
    folder = larger / "eval" / "scorers" / "scienceqa"
    problems, names = read(folder / "problems.json"), read(folder / "pid_splits.json")["minitest"]
    found = [record_of(conversation_of(name, problems[name], prompt_format), "") for name in names]
    assert found == read(folder / "converted_minitest.json")[prompt_format]


@pytest.mark.parametrize("prompt_format", ["QCM-A", "QCM-LEA", "QCM-LEPA"])
def test_conversion_of_scienceqa_s_training_split(larger, prompt_format):
    folder = larger / "mix" / "scienceqa"
    problems, names = read(folder / "problems.json"), read(folder / "pid_splits.json")["train"]
    found = [record_of(conversation_of(name, problems[name], prompt_format), "") for name in names]
    assert found == read(folder / f"llava_train_{prompt_format}.json")
