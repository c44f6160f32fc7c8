"""What a record must be, and the reasons for which one is quarantined."""

from dataclasses import dataclass
from typing import Any

REASONS: dict[str, str] = {
    "json_syntax": "the line is not JSON",
    "json_encoding": "the line is not UTF-8, or a text holds half a character",
    "json_constant": "NaN or Infinity is no JSON",
    "json_duplicate_key": "a key comes twice in one object",
    "json_too_deep": "objects nested too deep",
    "json_too_large": "the record is too large",
    "not_an_object": "a record is an object with id, image and conversations",
    "id_type": "the id is neither text nor a whole number",
    "image_type": "one image per record, its path as text; leave the key out when there is none",
    "image_key": "the image is looked for under 'image' alone",
    "conversations": "conversations is a list of {from, value}",
    "turn": "a turn is {from: human or gpt, value: text}",
    "role": "a turn is from human or gpt",
    "role_order": "human and gpt take turns, human first",
    "no_answer": "nothing to learn: no answer of gpt",
    "unanswered": "the conversation ends with a question",
    "empty_turn": "a turn without text",
    "plain_turns": "template plain wants one human and one gpt turn",
    "image_count": "as many <image> as images: one where the record has an image",
    "control_literal": "the text spells a control token, which the original would take for one",
    "separator_in_text": "the text holds what the template separates turns with",
    "unknown_token": "the text holds characters that the tokenizer does not know",
    "nothing_supervised": "no supervised token left after the cut at data.max_tokens",
    "image_path": "the image's path leads out of data.images, or is no path",
    "image_not_found": "no such image file",
    "image_not_a_file": "the image is no regular file",
    "image_bytes": "the image file is empty or larger than data.max_image_bytes",
    "image_format": "the image file is no JPEG, PNG, WebP, GIF or BMP",
    "image_unreadable": "the image's header is broken",
    "image_mode": "pixels of a kind that has no plain colour",
    "image_pixels": "more pixels than data.max_image_pixels",
    "image_side": "a side shorter than data.min_image_side",
    "image_aspect": "longer than data.max_image_aspect times its width",
    "image_truncated": "the image file ends early",
}
"""Every reason a record can be quarantined for, and what it means."""


class BadRecord(Exception):
    """A record that cannot be trained on as it stands. `reason` is a key of REASONS."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[Any, ...]:
        return BadRecord, (self.reason, self.detail)


@dataclass(frozen=True)
class Record:
    """One checked record."""

    id: str | int
    image: str | None
    """Path below the image folder, as the record has it."""
    turns: list[tuple[str, str]]
    """(human or gpt, text) in order."""

    @property
    def length_key(self) -> int:
        """The original's length for its sampler: whitespace words of all turns, negative when text-only (`modality_lengths`)."""
        words = sum(len(text.split()) for _, text in self.turns)
        return -words if self.image is None else words


def check_record(value: Any, index: int) -> Record:
    """The record in the JSON value `value`, number `index` of its file. Raises BadRecord.

    A record without an id is called '#index'. Other keys than id, image and conversations mean nothing here.
    """
    if not isinstance(value, dict):
        raise BadRecord("not_an_object", f"is {_kind(value)}; write an object with id, image and conversations")
    name = value.get("id")
    if name is None:
        name = f"#{index}"
    elif isinstance(name, bool) or not isinstance(name, (str, int)):
        raise BadRecord("id_type", f"id is {_kind(name)}; write a text or a whole number")
    image = None
    if "image" in value:
        image = value["image"]
        if not isinstance(image, str):
            raise BadRecord("image_type", f"image is {_kind(image)}; write one path as text, or leave the key out")
    elif "images" in value:
        raise BadRecord("image_key", "has the key 'images' and no 'image'; write one path under 'image', or leave the key out")
    turns = value.get("conversations")
    if not isinstance(turns, list):
        given = f"is {_kind(turns)}" if "conversations" in value else "is missing"
        raise BadRecord("conversations", f"conversations {given}; write a list of {{from, value}}")
    return Record(name, image, [_turn(turn, number) for number, turn in enumerate(turns)])


def _turn(turn: Any, number: int) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise BadRecord("turn", f"turn {number} is {_kind(turn)}; write {{from: human or gpt, value: text}}")
    role, text = turn.get("from"), turn.get("value")
    if not isinstance(role, str) or not isinstance(text, str):
        key = "value" if isinstance(role, str) else "from"
        given = f"is {_kind(turn[key])}" if key in turn else "is missing"
        raise BadRecord("turn", f"turn {number}: {key} {given}; write {{from: human or gpt, value: text}}")
    if role not in ("human", "gpt"):
        raise BadRecord("role", f"turn {number} is from {role[:40]!r}; write human or gpt")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecord("json_encoding", f"turn {number} holds half a character (such as \\ud83d alone); repair the encoding") from None
    return role, text


def _kind(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
