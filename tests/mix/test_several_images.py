"""Rows of several pictures go into a mix as far as max_images allows, and on into a prepared set."""

import json

import pytest
from annotation_files import write
from PIL import Image

from fastllava.batch import ImageSpec
from fastllava.config import DataConfig
from fastllava.data.prepared import prepare
from fastllava.data.tokenizer import Tokenizer
from fastllava.mix.build import MANIFEST
from fastllava.mix.compare import kinds_in
from fastllava.mix.conversation import BadRow, Conversation, Pair, record_of

PAIRS = [Pair("Q", "a"), Pair("R", "b")]


def talk(*texts):
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def parts(*kinds):
    return [{"type": "image"} if kind == "image" else {"type": "text", "text": kind} for kind in kinds]


ROWS = {
    "llava": [
        {"id": 1, "image": ["a.png", "b.png"], "conversations": talk("Is <image> like <image>?", "no")},
        {"id": 2, "image": ["a.png"], "conversations": talk("<image>\nQ", "no")},
        {"id": 3, "image": ["a.png", "b.png", "a.png"], "conversations": talk("<image><image><image>", "no")},
    ],
    "chat": [
        {"image": ["a.png", "b.png"], "conversations": talk("Is <image> like <image>?", "no")},
        {"image": ["a.png", "b.png"], "conversations": talk("Same?", "no")},
        {"image": ["a.png", "b.png"], "conversations": talk("<image>\nSame?", "no")},
    ],
    "messages": [
        {
            "images": ["a.png", "b.png"],
            "messages": [{"role": "user", "content": parts("image", "then", "image", "Same?")}, {"role": "assistant", "content": "no"}],
        },
    ],
}


@pytest.fixture
def given(tmp_path):
    (tmp_path / "images" / "own").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (30, 20)).save(tmp_path / "images" / "own" / name)
    sources = []
    for form, rows in ROWS.items():
        key = "records" if form == "llava" else "rows"
        sources.append({"name": form, "format": form, "images": "own", "files": {key: str(write(tmp_path / f"{form}.json", rows))}})
    return {"images": str(tmp_path / "images"), "max_bad_share": 1.0, "sources": sources}


def reasons_of(built):
    return [json.loads(line)["reason"] for line in (built.folder / "dropped.jsonl").read_text().splitlines()]


def test_they_pass_as_far_as_is_allowed_and_prepare_takes_them(given, made, tmp_path, golden, working):
    records, built = made({**given, "max_images": 2})
    two = ["own/a.png", "own/b.png"]
    assert [record["image"] for record in records] == [two, "own/a.png", two, two, two]
    assert [record["conversations"][0]["value"] for record in records] == [
        "Is <image> like <image>?",
        "<image>\nQ",
        "Is <image> like <image>?",
        "<image>\n<image>\nSame?",
        "<image>\nthen\n<image>\nSame?",
    ]
    assert reasons_of(built) == ["max_images", "image_word"]
    data = DataConfig(
        records=built.folder / "mix.json", images=tmp_path / "images", image_policy="pad", template="v1", group_by_modality=False,
        prepared_dir=tmp_path / "prepared", workers=0, max_quarantined_share=0.0, max_images=2,
    )  # fmt: skip
    prepared = prepare(data, Tokenizer.load(golden / "tokenizer"), ImageSpec(56, 16, (0.5,) * 3, (0.5,) * 3), report=lambda _: None)
    assert prepared.n_images.tolist() == [2, 1, 2, 2, 2]
    kinds, broken = kinds_in(built.folder / "mix.json", working)
    assert {name: tally.records for name, tally in kinds.items()} == {"several images": 4, "own": 1}
    assert broken == 0


def test_by_default_one_picture_is_a_record_s(given, made):
    given["sources"] = given["sources"][:1]
    records, built = made(given)
    assert [record["image"] for record in records] == ["own/a.png"]
    dropped = [json.loads(line) for line in (built.folder / "dropped.jsonl").read_text().splitlines()]
    assert [entry["reason"] for entry in dropped] == ["max_images"] * 2
    assert dropped[0]["detail"] == "names 2 images, and max_images allows 1; write max_images: 2, and data.max_images for the training"
    # Mixes that were built before there was the key stay what their manifests say.
    assert "max_images" not in json.loads((built.folder / MANIFEST).read_text())["config"]


def test_one_missing_picture_takes_the_record_along(given, made, tmp_path):
    (tmp_path / "images" / "own" / "b.png").unlink()
    records, built = made({**given, "max_images": 3, "sources": given["sources"][:1]})
    assert [record["id"] for record in records] == [2]
    assert reasons_of(built) == ["image_missing"] * 2


def test_a_record_has_a_word_for_each_picture():
    shown = record_of(Conversation(1, ("a", "b"), PAIRS), "own")
    assert (shown["image"], shown["conversations"][0]["value"]) == (["own/a", "own/b"], "<image>\n<image>\nQ")
    placed = [Pair("Q <image>", "a"), Pair("<image> R", "b")]
    assert record_of(Conversation(1, ("a", "b"), placed, placed=True), "")["image"] == ["a", "b"]
    with pytest.raises(BadRow, match="spells <image> 1 times; it may stand for each of the record's 2 pictures alone"):
        record_of(Conversation(1, ("a", "b"), [Pair("Q <image>", "a")], placed=True), "")
