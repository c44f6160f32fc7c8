"""Keys that are not LLaVA's: what would change what is learned is honoured or refused, and the rest is counted."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from fastllava.batch import ImageSpec
from fastllava.config import DataConfig
from fastllava.data.checks import BadRecord, check_record
from fastllava.data.conversation import TEMPLATES, encode_record, segments, template
from fastllava.data.prepared import prepare
from fastllava.data.tokenizer import Tokenizer

MakeData = Callable[..., DataConfig]
ASK, ANSWER = {"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}
SHOW = {"from": "human", "value": "<image>\nWhat?"}


def record(*turns: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"id": "r", "conversations": list(turns), **others}


REFUSED = {
    # The picture lies under another key.
    "image_path": (record(SHOW, ANSWER, image_path="a.png"), "image_key", "'image_path'"),
    "img, <image> is not written": (record(ASK, ANSWER, img="a.png"), "image_key", "'img'"),
    "Image": (record(SHOW, ANSWER, Image="a.png"), "image_key", "'Image'"),
    "image_id alone": (record(SHOW, ANSWER, image_id=7), "image_key", "'image_id'"),
    "imageFile": (record(SHOW, ANSWER, imageFile="a"), "image_key", "'imageFile'"),
    "images": (record(SHOW, ANSWER, images=["a.png"]), "image_key", "'images'"),
    "video": (record({"from": "human", "value": "<video>\nWhat?"}, ANSWER, video="a.mp4"), "image_key", "'video'"),
    "audio beside image": (record(SHOW, ANSWER, image="a.png", audio="a.wav"), "image_key", "'audio'"),
    "images beside image": (record(SHOW, ANSWER, image="a.png", images=["a.png", "b.png"]), "image_key", "'images'"),
    "image2 beside image": (record(SHOW, ANSWER, image="a.png", image2="b.png"), "image_key", "'image2'"),
    "a file under any name": (record(SHOW, ANSWER, source="coco/a.JPG"), "image_key", "'source'"),
    "a list of files": (record(SHOW, ANSWER, files=["a.webp"]), "image_key", "'files'"),
    "a picture in a turn": (record(SHOW | {"image": "a.png"}, ANSWER), "image_key", "turn 0 has 'image'"),
    # What is to be learned is said in a way that is not done.
    "half a weight": (record(ASK, ANSWER | {"weight": 0.5}), "loss_flag", "'weight': 0.5"),
    "a word for a flag": (record(ASK, ANSWER | {"train": "false"}), "loss_flag", "'train': 'false'"),
    "mask": (record(ASK, ANSWER | {"mask": 1}), "loss_flag", "'mask': 1"),
    "parts of a turn": (record(ASK, ANSWER | {"train_detail": [{"train": False}]}), "loss_flag", "'train_detail'"),
    "flags at odds": (record(ASK, ANSWER | {"train": True, "weight": 0}), "loss_flag", "the opposite"),
    "a question to learn": (record(ASK | {"train": True}, ANSWER), "loss_flag", "turn 0 is a question"),
    "a record to leave out": (record(ASK, ANSWER, train=False), "loss_flag", "left out"),
    "a weight of a record": (record(ASK, ANSWER, weight=2), "loss_flag", "'weight': 2"),
    "a mask of a record": (record(ASK, ANSWER, loss_mask=[0, 1]), "loss_flag", "'loss_mask'"),
    "all answers left out": (record(ASK, ANSWER | {"train": False}), "nothing_supervised", "not to be learned"),
    # What is asked for is not done.
    "system": (record(ASK, ANSWER, system="Be short."), "system_text", "'Be short.'"),
    "system is a list": (record(ASK, ANSWER, system_prompt=["Be short."]), "system_text", "'system_prompt'"),
    "system in a turn": (record(ASK | {"system": "Be short."}, ANSWER), "system_text", "turn 0 has 'system'"),
    "tools": (record(ASK, ANSWER, tools=[{"name": "f"}]), "unsupported_key", "'tools'"),
    "tool calls in a turn": (record(ASK, ANSWER | {"tool_calls": [{}]}), "unsupported_key", "turn 1 has 'tool_calls'"),
    "rejected": (record(ASK, ANSWER, rejected={"value": "A cat."}), "unsupported_key", "'rejected'"),
    "history": (record(ASK, ANSWER, history=[["a", "b"]]), "unsupported_key", "'history'"),
    "messages beside conversations": (record(ASK, ANSWER, messages=[ASK]), "unsupported_key", "'messages'"),
    "content beside value": (record(ASK, ANSWER | {"content": "A cat."}), "turn", "'value' and 'content'"),
    "role beside from": (record(ASK, ANSWER | {"role": "user"}), "turn", "'from' and 'role'"),
    # Other forms are called what they are.
    "OpenAI's form": ({"id": 1, "messages": [{"role": "user", "content": "Hi"}]}, "conversations", "OpenAI's form"),
    "Alpaca's form": ({"instruction": "x", "output": "y"}, "conversations", "Alpaca's form"),
    "OpenAI's turns": (record({"role": "user", "content": "Hi"}, ANSWER), "turn", "user is human, assistant is gpt"),
    "OpenAI's roles": (record({"from": "user", "value": "Hi"}, ANSWER), "role", "from 'user'; write human or gpt (user is human"),
    "a system turn": (record({"from": "system", "value": "Hi"}, ASK, ANSWER), "role", "take the turn out"),
    "a list of records below a key": ({"data": [record(ASK, ANSWER)]}, "conversations", "lie under 'data'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_is_refused_by_its_name(name: str, tokenizer: Tokenizer) -> None:
    value, reason, says = REFUSED[name]
    with pytest.raises(BadRecord) as problem:
        encode_record(check_record(value, 0), template("v1"), tokenizer, 2048)
    assert problem.value.reason == reason
    assert says in problem.value.detail
    assert "\n" not in problem.value.detail


@pytest.mark.parametrize(
    "others",
    [
        {"image_path": None, "video": "", "images": [], "tools": [], "history": [], "system": "", "has_image": False, "n_images": 0},
        {"model": "gpt-4", "source": "chat", "url": "https://example.org/a.png", "bbox": [1, 2], "width": 3, "mask": "masks/1.json"},
        {"train": True, "weight": 1.0, "loss": 1},
        {"system": template("v1").system},
    ],
)
def test_what_changes_nothing_is_taken(others: dict[str, Any], tokenizer: Tokenizer) -> None:
    form, value = template("v1"), record(ASK, ANSWER)
    expected = encode_record(check_record(value, 0), form, tokenizer, 2048)
    assert encode_record(check_record(value | others, 0), form, tokenizer, 2048) == expected
    turns = [ASK | {"markdown": None, "text": None, "train": False}, ANSWER | {"role": "assistant", "content": "A dog.", "loss": 1}]
    assert encode_record(check_record(record(*turns), 0), form, tokenizer, 2048) == expected


def test_metadata_of_a_picture_beside_the_picture_is_taken() -> None:
    others = {"image_id": 12, "image_size": [3, 4], "images": ["a.png"], "video_id": "v1", "caption": "A dog.", "source_image": "b.png"}
    checked = check_record(record(SHOW | {"image": "a.png"}, ANSWER, image="a.png", **others), 0)
    assert checked.images == ("a.png",)
    assert checked.other_keys == (*(f"'{key}'" for key in others), "turn 'image'")


LEFT_OUT = [{"train": False}, {"trainable": False}, {"loss": 0}, {"weight": 0.0}, {"loss_mask": 0}, {"loss_weight": 0, "train": None}]


@pytest.mark.parametrize("flag", LEFT_OUT)
@pytest.mark.parametrize("name", [name for name, form in TEMPLATES.items() if form.style != "plain"])
def test_an_answer_that_is_not_to_be_learned_is_read_alone(flag: dict[str, Any], name: str, tokenizer: Tokenizer) -> None:
    """The ids stay, an answer before the first question included; of what is supervised the answer and its end go."""
    rounds = [SHOW, ANSWER, ASK, {"from": "gpt", "value": "A cat."}]
    form = template(name)
    for first in ([], [{"from": "gpt", "value": "Hello."}]):
        plain = check_record(record(*first, *rounds, image="a.png"), 0)
        marked = check_record(record(*first, SHOW, ANSWER | flag, *rounds[2:], image="a.png"), 0)
        parts, changed = segments(plain, form), segments(marked, form)
        assert [(part.text, part.mark) for part in parts] == [(part.text, part.mark) for part in changed]
        assert "".join(part.text for part in changed if part.supervised).count("A dog.") == 0
        gone = "".join(old.text for old, new in zip(parts, changed, strict=True) if old.supervised != new.supervised)
        opens = form.head.format(role=form.gpt) if form.head_learned else "Assistant: "
        assert gone.strip().removeprefix(opens).startswith("A dog.")
        assert "A cat." not in gone
        both, one = encode_record(plain, form, tokenizer, 2048), encode_record(marked, form, tokenizer, 2048)
        assert both.ids == one.ids
        left = [{i for begin, end in encoded.supervised for i in range(begin, end)} for encoded in (both, one)]
        assert left[1] < left[0]
        assert tokenizer.decode(both.ids[i] for i in sorted(left[0] - left[1])).strip().removeprefix(opens).startswith("A dog.")


def test_the_rest_is_counted_in_one_line(make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec) -> None:
    turns = [ASK, ANSWER | {"train": False}, ASK, ANSWER | {"emotion": "x"}]
    values = [record(ASK, ANSWER, model="gpt-4"), record(*turns, model="gpt-4", **{"a\x1b[2J" + "k" * 100: 1}), record(ASK, model="x")]
    lines: list[str] = []
    prepared = prepare(make_data(values), tokenizer, spec, lines.append)
    assert prepared.manifest["answers_left_out"] == 1
    said = "\n".join(lines)
    assert "1 answers are left out of the loss" in said
    (line,) = [line for line in said.splitlines() if line.startswith("keys that mean nothing here: ")]
    assert line.startswith("keys that mean nothing here: 'model' (2), ")
    assert "turn 'emotion' (1)" in line
    assert "\\x1b[2Jkkk" in line
    assert "(105 characters)" in line


def test_names_without_end_are_counted_together(make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec) -> None:
    values = [record(ASK, ANSWER, **{f"key {i}": 1}) for i in range(1200)]
    lines: list[str] = []
    manifest = prepare(make_data(values), tokenizer, spec, lines.append).manifest
    assert len(manifest["other_keys"]) == 1001
    assert manifest["other_keys"]["others"] == 200
    assert "\n".join(lines).count("and 989 more") == 1


def test_huge_values_are_not_copied(make_data: MakeData, tokenizer: Tokenizer, spec: ImageSpec) -> None:
    huge = "x" * 10**6
    values = [
        record(ASK, ANSWER) | {"id": huge},
        record(ASK, {"from": huge, "value": "x"}) | {"id": huge},
        record(SHOW, ANSWER, image=huge),
        record(ASK, ANSWER, system=huge),
        record(ASK, ANSWER | {"loss": huge}),
        record(ASK, ANSWER | {"tools": huge, huge: 1}),
        record(ASK, ANSWER, **{huge: huge}),
        record(ASK, ANSWER) | {"id": 10**4000},
    ]
    lines: list[str] = []
    prepared = prepare(make_data(values), tokenizer, spec, lines.append)
    assert len(prepared) == 3
    assert max(len(line) for line in "\n".join(lines).splitlines()) < 700
    for line in (prepared.folder / "quarantine.jsonl").read_text().splitlines():
        assert len(line) < 6000
        assert len(json.loads(line)["detail"]) < 400
    assert all(len(prepared.row(i).id) < 300 for i in range(3))
