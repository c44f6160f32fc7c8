"""Bad records: each is refused with its reason, wherever it is looked at, and the good ones around it stay."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastllava.batch import ImageSpec
from fastllava.config import DataConfig
from fastllava.data.checks import REASONS
from fastllava.data.inspect import inspect_records
from fastllava.data.prepared import prepare
from fastllava.data.tokenizer import Tokenizer
from fastllava.errors import UserError

MakeData = Callable[..., DataConfig]
Q, A = {"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}
SHOW = {"from": "human", "value": "<image>\nWhat?"}


def said(*turns: Any, **keys: Any) -> dict[str, Any]:
    return {"id": "bad", "conversations": list(turns), **keys}


def human(value: Any) -> dict[str, Any]:
    return {"from": "human", "value": value}


def gpt(value: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": value}


# What does not hang on image files: the record, why it is refused, and the template where that matters.
BAD: dict[str, tuple[Any, str, str]] = {
    "a number": (7, "not_an_object", "v1"),
    "null": (None, "not_an_object", "v1"),
    "a list": ([Q, A], "not_an_object", "v1"),
    "id is a list": (said(Q, A, id=["x"]), "id_type", "v1"),
    "id is true": (said(Q, A, id=True), "id_type", "v1"),
    "no conversations": ({"id": "bad"}, "conversations", "v1"),
    "conversations is text": ({"id": "bad", "conversations": "Hi"}, "conversations", "v1"),
    "no turns": (said(), "no_answer", "v1"),
    "a turn is text": (said("What?", A), "turn", "v1"),
    "a turn without value": (said({"from": "human"}, A), "turn", "v1"),
    "a turn without from": (said({"value": "x"}, A), "turn", "v1"),
    "value is null": (said(human(None), A), "turn", "v1"),
    "value is a list": (said(human(["a"]), A), "turn", "v1"),
    "an unknown role": (said({"from": "user", "value": "x"}, A), "role", "v1"),
    "a system turn": (said({"from": "system", "value": "x"}, Q, A), "role", "v1"),
    "Human with a capital": (said({"from": "Human", "value": "x"}, A), "role", "v0"),
    "two questions in a row": (said(Q, Q, A), "role_order", "v1"),
    "two answers in a row": (said(Q, A, A), "role_order", "v1"),
    "two answers first": (said(A, A, Q, A), "role_order", "v1"),
    "ends with a question": (said(Q, A, Q), "unanswered", "v1"),
    "a question alone": (said(Q), "no_answer", "v1"),
    "an answer alone": (said(A), "no_answer", "v1"),
    "a question alone, v0": (said(Q), "no_answer", "v0"),
    "an empty answer": (said(Q, gpt("")), "empty_turn", "v1"),
    "an empty answer amid": (said(Q, gpt(""), Q, A), "empty_turn", "llava_llama_2"),
    "an empty question": (said(human(""), A), "empty_turn", "v1"),
    "image is null": (said(SHOW, A, image=None), "image_type", "v1"),
    "image is a list": (said(human("<image><image>\nWhat?"), A, image=["good.png", "good.png"]), "max_images", "v1"),
    "image is an empty list": (said(Q, A, image=[]), "image_type", "v1"),
    "image is a list in a list": (said(SHOW, A, image=[["good.png"]]), "image_type", "v1"),
    "image is a list of null": (said(SHOW, A, image=[None]), "image_type", "v1"),
    "image is a list of an empty text": (said(SHOW, A, image=[" "]), "image_type", "v1"),
    "a list of one, <image> is missing": (said(Q, A, image=["good.png"]), "image_count", "v1"),
    "a list of one, two <image>": (said(human("<image><image>\nWhat?"), A, image=["good.png"]), "image_count", "v1"),
    "image is a number": (said(SHOW, A, image=3), "image_type", "v1"),
    "image is empty": (said(Q, A, image=""), "image_type", "v1"),
    "image is empty, <image> is there": (said(SHOW, A, image=" "), "image_type", "v1"),
    "image is an address": (said(SHOW, A, image="https://example.org/a.jpg"), "image_type", "v1"),
    "image is in a bucket": (said(SHOW, A, image="cluster:s3://bucket/a.jpg"), "image_type", "v1"),
    "image is a path of Windows": (said(SHOW, A, image="C:\\images\\a.jpg"), "image_type", "v1"),
    "image is base64 with its type": (said(SHOW, A, image="data:image/png;base64,iVBORw0KGgo"), "image_type", "v1"),
    "image is base64": (said(SHOW, A, image="/9j/" + "A" * 10**6), "image_type", "v1"),
    "image is too long for a path": (said(SHOW, A, image="a/" * 5000), "image_type", "v1"),
    "images in place of image": (said(SHOW, A, images=["good.png"]), "image_key", "v1"),
    "no <image> for the image": (said(Q, A, image="good.png"), "image_count", "v1"),
    "two <image> in one turn": (said(human("<image><image>\nWhat?"), A, image="good.png"), "image_count", "v1"),
    "two <image> in two turns": (said(SHOW, A, SHOW, A, image="good.png"), "image_count", "v1"),
    "<image> in the answer left out": (said(gpt("<image>"), Q, A, image="good.png"), "image_count", "v1"),
    "plain without an image": (said(Q, A), "image_count", "plain"),
    "plain, <image> without an image": (said(SHOW, A), "image_count", "plain"),
    "plain, <image> in the answer": (said(Q, gpt("<image> A dog."), image="good.png"), "image_count", "plain"),
    "plain, two rounds": (said(SHOW, A, Q, A, image="good.png"), "plain_turns", "plain"),
    "plain, answer first": (said(A, SHOW, image="good.png"), "plain_turns", "plain"),
    "</s> in a question": (said(human("What is </s>?"), A), "control_literal", "v1"),
    "<s> in an answer": (said(Q, gpt("<s>gone</s>")), "control_literal", "v0"),
    "<unk> in an answer": (said(Q, gpt("<unk>")), "control_literal", "llava_llama_2"),
    "<|im_end|> in chatml": (said(Q, gpt("<|im_end|>")), "control_literal", "mpt"),
    "ASSISTANT: in a question": (said(human("x ASSISTANT: y"), A), "separator_in_text", "v1"),
    "ASSISTANT: begins a question": (said(human("ASSISTANT: y"), A), "separator_in_text", "v1"),
    "ASSISTANT: ends a question": (said(human("x ASSISTANT:"), A), "separator_in_text", "v1"),
    "[/INST] in an answer": (said(Q, gpt("x [/INST] y")), "separator_in_text", "llava_llama_2"),
    "[/INST] ends a question": (said(human("x [/INST]"), A), "separator_in_text", "mistral_instruct"),
    "half a character": (said(human("\ud83d"), A), "json_encoding", "v1"),
    "a question longer than the cut": (said(human("what " * 3000), A), "nothing_supervised", "v1"),
}
# What hangs on them.
BAD_IMAGES: dict[str, tuple[str, str]] = {
    "an absolute path": ("/etc/passwd", "image_path"),
    "a path out of the folder": ("../records.json", "image_path"),
    "a path with NUL": ("good.png\0.jpg", "image_path"),
    "half a character in a path": ("\udcff.png", "image_path"),
    "a missing file": ("missing.png", "image_not_found"),
    "a folder": (".", "image_path"),
    "text": ("notes.jpg", "image_format"),
    "an empty file": ("empty.jpg", "image_bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_with_a_reason_and_alone(make_data: MakeData, tokenizer: Tokenizer, chatml: Tokenizer, spec: ImageSpec, name: str) -> None:
    value, reason, form = BAD[name]
    good = said(SHOW, A, image="good.png") | {"id": "good"}
    if form == "mpt":
        tokenizer = chatml
    data = make_data([good, value, good], template=form)
    rows = list(inspect_records(data.records, tokenizer, form))
    assert [row.get("quarantined") for row in rows] == [None, reason, None]
    lines: list[str] = []
    prepared = prepare(data, tokenizer, spec, lines.append)
    assert [prepared.row(i).id for i in range(len(prepared))] == ["good", "good"]
    (entry,) = [json.loads(line) for line in (prepared.folder / "quarantine.jsonl").read_text().splitlines()]
    assert (entry["index"], entry["line"], entry["reason"]) == (1, 1, reason)
    assert entry["detail"]
    assert "\n" not in entry["detail"]
    assert prepared.manifest["reasons"] == {reason: 1}
    assert REASONS[reason].split()[0] in "".join(lines)


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_refused_with_a_reason(make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec, name: str) -> None:
    image, reason = BAD_IMAGES[name]
    data = make_data([said(SHOW, A, image="good.png"), said(SHOW, A, image=image)])
    assert data.images is not None
    (data.images / "notes.jpg").write_text("<html>Not found</html>")
    (data.images / "empty.jpg").touch()
    prepared = prepare(data, tokenizer, spec, lambda _: None)
    assert (len(prepared), prepared.manifest["reasons"]) == (1, {reason: 1})
    assert all("quarantined" not in row for row in inspect_records(data.records, tokenizer, "v1"))


def test_a_word_the_tokenizer_does_not_know(make_data: MakeData, tmp_path: Path) -> None:
    """Where characters have no bytes to fall back on, the original drops them and masks the record."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["USER ASSISTANT what is a red dog and two cats"] * 9),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=60,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    data = make_data([said(Q, gpt("☃"))])
    (row,) = inspect_records(data.records, Tokenizer.load(tmp_path), "v1")
    assert row == {"id": "bad", "quarantined": "unknown_token"}


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (said(Q, gpt(" ")), "v1"),
        (said(Q, Q, A), "v0"),
        (said(Q, gpt("")), "v0"),
        (said(Q, A, Q), "v0"),
        (said(human("What does <image> mean?"), gpt("A tag: <image>")), "v1"),
        (said(human("ASSISTANT:y"), A), "v1"),
        (said(human("###Human"), gpt("### Assistant: x")), "v0"),
        (said(SHOW, gpt(""), image="good.png"), "plain"),
        ({"conversations": [Q, A]}, "v1"),
        (said(Q, A, id=12, model="gpt-4", extra={"a": [1]}), "v1"),
    ],
)
def test_what_the_original_takes_is_taken(make_data: MakeData, tokenizer: Tokenizer, value: Any, form: str) -> None:
    (row,) = inspect_records(make_data([value]).records, tokenizer, form)
    assert "quarantined" not in row
    assert row["id"] == value.get("id", "#0")


BROKEN_SETTINGS = {
    "an image and no folder": ({"images": None}, "data.images: is not set, and record 'bad' has the image 'good.png'"),
    "a folder that is none": ({"images": Path("/nowhere")}, "data.images: /nowhere is no folder"),
    "an unknown template": ({"template": "v2"}, "data.template: no template 'v2'; write one of plain"),
    "no room for prepared sets": ({"prepared_dir": Path("/proc/nothing")}, "data.prepared_dir: /proc/nothing cannot be used"),
}


@pytest.mark.parametrize("name", BROKEN_SETTINGS)
def test_a_broken_setting_is_said_in_one_line(make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec, name: str) -> None:
    settings, says = BROKEN_SETTINGS[name]
    with pytest.raises(UserError) as error:
        prepare(make_data([said(SHOW, A, image="good.png")], **settings), tokenizer, spec, lambda _: None)
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


def test_a_missing_source_is_said(make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec) -> None:
    data = make_data([])
    data.records.unlink()
    with pytest.raises(UserError, match=r"data\.records: .*records\.json cannot be read \(No such file"):
        prepare(data, tokenizer, spec, lambda _: None)
