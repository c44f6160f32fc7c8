"""Records of several pictures: each in its place, bounded by data.max_images, and all of them or none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastllava.batch import IMAGE_ID, ImageSpec
from fastllava.config import DataConfig
from fastllava.data.checks import BadRecord, Record, check_record
from fastllava.data.conversation import TEMPLATES, encode_record, prompt, segments, template
from fastllava.data.inspect import inspect_records
from fastllava.data.loader import BadImages, pack, read_sample
from fastllava.data.prepared import prepare
from fastllava.data.prepared_set import PreparedSet
from fastllava.data.tokenizer import Tokenizer

MakeData = Callable[..., DataConfig]
COLOURS = {"red.png": (250, 0, 0), "green.png": (0, 250, 0), "blue.png": (0, 0, 250)}
THREE = list(COLOURS)
PATCHES = 16


def record(images: Any, question: str, *more: str, answer: str = "A dog.") -> dict[str, Any]:
    turns = [{"from": role, "value": text} for one in (question, *more) for role, text in (("human", one), ("gpt", answer))]
    return {"id": "r", **({} if images is None else {"image": images}), "conversations": turns}


@pytest.fixture
def data(make_data: MakeData) -> MakeData:
    """`make_data` with three pictures of one colour each, and room for three a record."""

    def make(records: Any, **settings: Any) -> DataConfig:
        made = make_data(records, **{"max_images": 3, **settings})
        assert made.images is not None
        for name, colour in COLOURS.items():
            Image.new("RGB", (40, 40), colour).save(made.images / name)
        return made

    return make


def quarantined(prepared: PreparedSet) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (prepared.folder / "quarantine.jsonl").read_text().splitlines()]


def colours_of(images: Any) -> list[tuple[int, ...]]:
    return [tuple(image.reshape(3, -1).mean(1).round().astype(int).tolist()) for image in images]


def test_each_picture_stands_where_its_word_stands_and_the_text_stays() -> None:
    asked = check_record(record(THREE, " Is <image> like\n<image>? ", "And <image>"), 0, 3)
    for name in ("v1", "v1_mmtag", "mpt", "llava_v0", "llava_llama_2", "qwen_2_5"):
        form = template(name)
        parts = segments(asked, form)
        before, after = ("<Image>", "</Image>") if form.mmtag else ("", "")
        shown = f"{before}<image>{after}"
        text = "".join(part.text for part in parts)
        assert f" Is {shown} like\n{shown}? " in text
        assert f"And {shown}" in text
        assert [part.mark for part in parts if part.text == "<image>"] == [True] * 3
        assert all(not part.supervised for part in parts if part.text == "<image>")
    ids = [part.text for part in segments(check_record(record(THREE, "Hm? <image><image>\n<image>"), 0, 3), template("plain"))]
    assert ids == ["<image>", "<image>", "<image>", "A dog.", "\n"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_list_of_one_is_the_picture(name: str) -> None:
    path = check_record(record("red.png", "What?\n<image>"), 0)
    assert check_record(record(["red.png"], "What?\n<image>"), 0) == check_record(record(["red.png"], "What?\n<image>"), 0, 3) == path
    assert segments(check_record(record(["red.png"], "What?\n<image>"), 0, 3), template(name)) == segments(path, template(name))


@pytest.mark.parametrize("form", ["v1", "llava_llama_2", "v1_mmtag", "plain"])
def test_a_prompt_is_the_record_up_to_the_answer(tokenizer: Tokenizer, form: str) -> None:
    question = "Is <image> like <image>?"
    ids = encode_record(Record("r", ("a", "b"), [("human", question), ("gpt", "a red dog")]), template(form), tokenizer, 2048).ids
    asked = prompt(form, question, 2, tokenizer, placed=True)
    assert ids[: len(asked)] == asked
    assert asked.count(IMAGE_ID) == 2
    # Without places they stand before it.
    assert prompt("v1", "Hm?", 2, tokenizer) == prompt("v1", "<image>\n<image>\nHm?", 2, tokenizer, placed=True)


REFUSED = {
    "more than the bound": (record(["a"] * 4, "<image>" * 4), 3, "max_images", "write at most 3, or data.max_images=4"),
    "two by default": (record(["a", "b"], "<image><image>"), 1, "max_images", "write one path as text, or data.max_images=2"),
    "more than there can be": (record(["a"] * 101, "<image>" * 101), 3, "max_images", "as 100 are the most"),
    "none": (record([], "Hm?"), 3, "image_type", "image is an empty list; leave the key out"),
    "a list in the list": (record(["a", ["b"]], "<image><image>"), 3, "image_type", "image 2 of the list is a list; write one path"),
    "null in the list": (record([None, "b"], "<image><image>"), 3, "image_type", "image 1 of the list is null"),
    "an address in the list": (record(["a", "https://x.org/b"], "<image><image>"), 3, "image_type", "image 2 of the list is an address"),
    "an empty text in the list": (record(["a", " "], "<image><image>"), 3, "image_type", "image 2 of the list is an empty text"),
    "one word missing": (
        record(["a", "b"], "<image>"),
        3,
        "image_count",
        "1 <image> in the turns and 2 images; write <image> once for each",
    ),
    "one word too many": (record(["a", "b"], "<image><image>", "<image>"), 3, "image_count", "3 <image> in the turns and 2 images"),
    "no word": (record(["a", "b"], "Hm?"), 3, "image_count", "0 <image> in the turns and 2 images"),
    "one picture, two words": (record("a", "<image><image>"), 3, "image_count", "2 <image> in the turns and 1 image; write <image> once, "),
    "another list beside it": (record(["a", "b"], "<image><image>") | {"images": ["a"]}, 3, "image_key", "all its pictures in one list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_one_line(tokenizer: Tokenizer, name: str) -> None:
    value, most, reason, says = REFUSED[name]
    with pytest.raises(BadRecord) as problem:
        encode_record(check_record(value, 0, most), template("v1"), tokenizer, 2048)
    assert problem.value.reason == reason
    assert says in problem.value.detail
    assert "\n" not in problem.value.detail


def test_the_lists_own_names_beside_it_are_taken() -> None:
    value = record(["a", "b"], "<image><image>") | {"images": ["a", "b"]}
    value["conversations"][0]["image"] = ["a", "b"]
    assert check_record(value, 0, 2).images == ("a", "b")
    value["conversations"][0]["image"] = "a"
    with pytest.raises(BadRecord, match="turn 0 has 'image'"):
        check_record(value, 0, 2)


def test_rows_and_samples_show_all_in_their_order(data: MakeData, tokenizer: Tokenizer, spec: ImageSpec) -> None:
    records = [
        record(THREE, "<image> <image>", "<image>"),
        record("green.png", "<image>"),
        record(None, "Hm?"),
        record(THREE[::2], "<image><image>"),
    ]
    made = data(records)
    prepared = prepare(made, tokenizer, spec, lambda _: None)
    assert [prepared.row(i).images for i in range(4)] == [tuple(THREE), ("green.png",), (), ("red.png", "blue.png")]
    assert prepared.n_images.tolist() == [3, 1, 0, 2]
    assert [prepared.row(i).shows for i in range(4)] == [THREE, "green.png", None, ["red.png", "blue.png"]]
    lengths = [len(prepared.row(i).ids) for i in range(4)]
    assert prepared.n_tokens.tolist() == [n + k * (PATCHES - 1) for n, k in zip(lengths, (3, 1, 0, 2), strict=True)]
    assert (prepared.length_key > 0).tolist() == [True, True, False, True]
    samples = [read_sample(prepared, spec, made, i, 1.0) for i in range(4)]
    shown = [colours_of(sample.images) for sample in samples]
    assert shown == [list(COLOURS.values()), [COLOURS["green.png"]], [], [COLOURS["red.png"], COLOURS["blue.png"]]]
    batch = pack(samples, spec, 2048)
    assert colours_of(batch.pixels.numpy()) == [colour for its in shown for colour in its]
    starts = batch.cu_seqlens.tolist()
    firsts = [start + at + before * (PATCHES - 1) for start, sample in zip(starts, samples, strict=False)
              for before, at in enumerate(np.flatnonzero(sample.ids == IMAGE_ID).tolist())]  # fmt: skip
    assert batch.patch_rows.view(-1, PATCHES)[:, 0].tolist() == firsts
    assert prepared.images() == {"red.png": [0, 4], "green.png": [1, 3], "blue.png": [2, 5]}
    assert prepared.samples_of([0, 4]) == {0, 3}
    assert [prepared.stamp(place) for place in range(6)] == [stamp for i in range(4) for stamp in prepared.row(i).stamps]
    assert prepared.sample_bytes().tolist() == [
        sum((made.images / name).stat().st_size for name in prepared.row(i).images) for i in range(4)
    ]


def test_a_bound_changes_nothing_for_records_of_one_picture(data: MakeData, tokenizer: Tokenizer, spec: ImageSpec) -> None:
    records = [record("red.png", "Hm?\n<image>"), record(None, "Hm?"), record(["blue.png"], "<image>")]
    made = data(records, max_images=1)
    one, three = (prepare(made.model_copy(update={"max_images": most}), tokenizer, spec, lambda _: None) for most in (1, 3))
    assert "max_images" not in one.manifest
    assert three.manifest["max_images"] == 3
    for i in range(3):
        mine, theirs = one.row(i), three.row(i)
        assert (mine.ids.tolist(), mine.images, mine.stamps) == (theirs.ids.tolist(), theirs.images, theirs.stamps)
    for name in ("n_tokens", "n_supervised", "n_images", "length_key"):
        assert getattr(one, name).tolist() == getattr(three, name).tolist()


def test_one_bad_picture_of_three_is_named(data: MakeData, tokenizer: Tokenizer, spec: ImageSpec) -> None:
    made = data([record(["red.png", "none.png", "blue.png"], "<image>" * 3), record(THREE, "<image>" * 3)])
    lines: list[str] = []
    prepared = prepare(made, tokenizer, spec, lines.append)
    (entry,) = quarantined(prepared)
    assert entry["reason"] == "image_not_found"
    assert entry["image"] == ["red.png", "none.png", "blue.png"]
    assert entry["detail"].startswith("image 2 of 3, 'none.png': there is no such file")
    # The same bad picture: the set is used again. Once it is there, the record is taken.
    assert prepare(made, tokenizer, spec, lines.append).digest == prepared.digest
    assert made.images is not None
    Image.new("RGB", (40, 40)).save(made.images / "none.png")
    assert len(prepare(made, tokenizer, spec, lines.append)) == 2
    # One that turns bad after that takes the whole sample along, and is named.
    (made.images / "green.png").write_bytes(b"gone")
    with pytest.raises(BadImages) as bad:
        read_sample(PreparedSet.open(prepared.folder), spec, made, 1, 1.0)
    (found,) = bad.value.found
    assert Path(found.path).name == "green.png"


def test_a_changed_picture_of_several_is_noticed_and_a_touched_one_is_not(data: MakeData, tokenizer: Tokenizer, spec: ImageSpec) -> None:
    import os

    made = data([record(["red.png", "green.png"], "<image>" * 2), record(THREE, "<image>" * 3)])
    lines: list[str] = []
    first = prepare(made, tokenizer, spec, lines.append)
    assert made.images is not None
    os.utime(made.images / "green.png", ns=(7, 7))
    again = prepare(made, tokenizer, spec, lines.append)
    assert again.digest == first.digest
    assert "1 images have another time and the same content" in lines
    assert [stamp.mtime_ns == 7 for stamp in PreparedSet.open(first.folder).row(1).stamps] == [False, True, False]
    assert [stamp.mtime_ns == 7 for stamp in PreparedSet.open(first.folder).row(0).stamps] == [False, True]
    Image.new("RGB", (40, 40), (9, 9, 9)).save(made.images / "blue.png")
    assert prepare(made, tokenizer, spec, lines.append).digest != first.digest
    assert any("image blue.png is not what it was" in line for line in lines)


def test_what_the_cut_takes_is_said(data: MakeData, tokenizer: Tokenizer, spec: ImageSpec) -> None:
    value = record(THREE, "<image>", "<image>", "<image>")
    whole = encode_record(check_record(value, 0, 3), template("v1"), tokenizer, 2048)
    second, third = [at for at, token in enumerate(whole.ids) if token == IMAGE_ID][1:]
    # The cut lies in the second picture; the third is behind it.
    most = second + (PATCHES - 1) + 5
    lines: list[str] = []
    made = data([value], max_tokens=most)
    prepared = prepare(made, tokenizer, spec, lines.append)
    assert prepared.row(0).images == ("red.png", "green.png")
    assert (prepared.n_images.tolist(), prepared.n_tokens.tolist()) == ([2], [most])
    assert "1 of those that were cut lost a picture, or a part of one" in "\n".join(lines)
    batch = pack([read_sample(prepared, spec, made, 0, 1.0)], spec, most)
    assert (batch.patch_rows < most).tolist() == [True] * (PATCHES + 5) + [False] * (PATCHES - 5)
    # Behind all pictures nothing is said of them.
    lines.clear()
    prepared = prepare(data([value], max_tokens=third + 2 * (PATCHES - 1) + PATCHES), tokenizer, spec, lines.append)
    assert (prepared.n_images.tolist(), prepared.manifest["truncated"], prepared.manifest["images_cut"]) == ([3], 1, 0)


def test_a_set_that_refused_a_list_of_one_is_made_anew(data: MakeData, tokenizer: Tokenizer, spec: ImageSpec, monkeypatch) -> None:
    made = data([record("red.png", "<image>"), record(["red.png"], "<image>")], max_images=1)

    def refuse(given: Any, most: int) -> tuple[str, ...]:
        if isinstance(given, list):
            raise BadRecord("image_type", "image is a list; write one path as text, or leave the key out")
        return (given,)

    with monkeypatch.context() as before:
        before.setattr("fastllava.data.checks._images", refuse)
        old = prepare(made, tokenizer, spec, lambda _: None)
    assert len(old) == 1
    lines: list[str] = []
    # A run that began with it keeps it.
    assert prepare(made, tokenizer, spec, lines.append, keep=old.digest).digest == old.digest
    assert len(prepare(made, tokenizer, spec, lines.append)) == 2
    assert any("record r may show one picture in a list, which it might not when" in line for line in lines)
    lines.clear()
    prepare(made, tokenizer, spec, lines.append)
    assert any("used again" in line for line in lines)


def test_inspect_takes_as_many_as_it_is_told(data: MakeData, tokenizer: Tokenizer) -> None:
    made = data([record(["red.png", "blue.png"], "<image>" * 2)])
    assert [row.get("quarantined") for row in inspect_records(made.records, tokenizer, "v1")] == ["max_images"]
    (row,) = inspect_records(made.records, tokenizer, "v1", max_images=2)
    assert row["input_ids"].count(IMAGE_ID) == 2
