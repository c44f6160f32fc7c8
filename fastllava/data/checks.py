"""What a record must be, and the reasons for which one is quarantined."""

import re
from dataclasses import dataclass
from typing import Any

from fastllava.config.keys import MOST_IMAGES
from fastllava.console.printable import quoted
from fastllava.data import keys

_KEYS = frozenset({"id", "image", "conversations"})
_TURN_KEYS = frozenset({"from", "value"})
_ADDRESS = re.compile(r"([\w.+-]{1,20}:){1,3}//|[a-z]:[\\/]", re.IGNORECASE)
_BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk0")
"""How JPEG, PNG, GIF, WebP and BMP files begin in base64."""
_LONGEST_PATH = 4096
_PUT_BELOW = "put the file below data.images and write its path from there"

REASONS: dict[str, str] = {
    "json_syntax": "the line is not JSON",
    "json_encoding": "the line is not UTF-8, or a text holds half a character",
    "json_constant": "NaN or Infinity is no JSON",
    "json_duplicate_key": "a key comes twice in one object",
    "json_too_deep": "objects nested too deep",
    "json_too_large": "the record is too large",
    "not_an_object": "a record is an object with id, image and conversations",
    "id_type": "the id is neither text nor a whole number",
    "image_type": "the image's path as text, or a list of such; leave the key out when there is none",
    "max_images": "a list of more pictures than data.max_images, which is 1 unless it is set",
    "image_key": "pictures are looked for under 'image' alone",
    "conversations": "conversations is a list of {from, value}",
    "turn": "a turn is {from: human or gpt, value: text}",
    "role": "a turn is from human or gpt",
    "role_order": "human and gpt take turns, human first",
    "system_text": "a system text of its own, where the template brings one",
    "loss_flag": "a mark that says what to learn in a way that is not done here",
    "unsupported_key": "a key asks for what is not done here",
    "no_answer": "nothing to learn: no answer of gpt",
    "unanswered": "the conversation ends with a question",
    "empty_turn": "a turn without text",
    "plain_turns": "template plain wants one human and one gpt turn",
    "image_count": "as many <image> as images",
    "control_literal": "the text spells a control token, which the original would take for one",
    "separator_in_text": "the text holds what the template separates turns with",
    "unknown_token": "the text holds characters that the tokenizer does not know",
    "tokenizer_failed": "the tokenizer breaks off at the text",
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
    "image_damaged": "bytes of the image file are not as they were written",
    "image_changed": "the image file is not the one that was prepared",
    "image_checksum": "the image is not as data.image_checksums lists it, or is not listed",
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
    images: tuple[str, ...]
    """Paths below the image folder, in the order of their <image>; none of a text-only record."""
    turns: list[tuple[str, str]]
    """(human or gpt, text) in order."""
    left_out: frozenset[int] = frozenset()
    """Numbers of the answers that are read and not learned, as flags of their turns say."""
    system: str = ""
    """The record's own system text."""
    other_keys: tuple[str, ...] = ()
    """Keys that mean nothing here, in quotes; those of turns after the word turn."""

    @property
    def length_key(self) -> int:
        """The original's length for its sampler: whitespace words of all turns, negative when text-only (`modality_lengths`)."""
        words = sum(len(text.split()) for _, text in self.turns)
        return words if self.images else -words


def check_record(value: Any, index: int, max_images: int = 1) -> Record:
    """The record in the JSON value `value`, number `index` of its file, with at most `max_images` pictures. Raises BadRecord.

    A record without an id is called '#index'. Of other keys than id, image and conversations those that would change what
    is learned are honoured or refused (`keys`). A list of one picture is that picture.
    """
    if not isinstance(value, dict):
        raise BadRecord("not_an_object", f"is {_kind(value)}; write an object with id, image and conversations")
    name = value.get("id")
    if name is None:
        name = f"#{index}"
    elif isinstance(name, bool) or not isinstance(name, (str, int)):
        raise BadRecord("id_type", f"id is {_kind(name)}; write a text or a whole number")
    images = _images(value["image"], max_images) if "image" in value else ()
    given = value.get("conversations")
    if not isinstance(given, list):
        found = f"is {_kind(given)}" if "conversations" in value else f"is missing{keys.another_form(value)}"
        raise BadRecord("conversations", f"conversations {found}; write a list of {{from, value}}")
    turns = [_turn(turn, number) for number, turn in enumerate(given)]
    others = [key for key in value if key not in _KEYS]
    if not others and all(len(turn) == 2 for turn in given):
        return Record(name, images, turns)
    _check(keys.record_problem(value, others, (text for _, text in turns)))
    left_out, of_turns = _read_flags(given, images)
    unused = [keys.name_of(key) for key in others if keys.means_nothing(key)]
    system = next((value[key] for key in others if keys.kind_of(key) == "system" and value[key]), "")
    return Record(name, images, turns, frozenset(left_out), system, tuple(dict.fromkeys(unused + of_turns)))


def _read_flags(turns: list[dict[str, Any]], images: tuple[str, ...]) -> tuple[list[int], list[str]]:
    """Numbers of the answers that are not to be learned, and the turns' keys that mean nothing here. Raises BadRecord."""
    left_out, unused = [], []
    for number, turn in enumerate(turns):
        others = [key for key in turn if key not in _TURN_KEYS]
        if not others:
            continue
        _check(keys.turn_problem(turn, others, number, images))
        learned, problem = keys.learned(turn, others, number)
        _check(problem)
        if learned is False and turn["from"] == "gpt":
            left_out.append(number)
        unused += [f"turn {keys.name_of(key)}" for key in others if keys.means_nothing(key)]
    return left_out, unused


def _check(problem: keys.Problem | None) -> None:
    if problem is not None:
        raise BadRecord(*problem)


def _images(given: Any, most: int) -> tuple[str, ...]:
    """The paths; that they are some is all that is seen here. Raises BadRecord."""
    if not isinstance(given, list):
        return (_path(given, "image"),)
    if not given:
        raise BadRecord("image_type", "image is an empty list; leave the key out where there is no image")
    if len(given) > most:
        asked = f"or data.max_images={len(given)}" if len(given) <= MOST_IMAGES else f"as {MOST_IMAGES} are the most"
        known = "one path as text" if most == 1 else f"at most {most}"
        raise BadRecord("max_images", f"image is a list; write {known}, {asked} (it has {len(given)}, data.max_images is {most})")
    return tuple(_path(one, "image" if len(given) == 1 else f"image {number} of the list") for number, one in enumerate(given, 1))


def _path(image: Any, what: str) -> str:
    """The path of one picture, which the record names under `what`. Raises BadRecord."""
    if not isinstance(image, str):
        raise BadRecord("image_type", f"{what} is {_kind(image)}; write one path as text, or leave {_it(what)} out")
    if not image.strip():
        raise BadRecord("image_type", f"{what} is an empty text; leave {_it(what)} out where there is no image")
    if image.startswith("data:") or (len(image) > 100 and image.startswith(_BASE64)):
        raise BadRecord("image_type", f"{what} is {quoted(image, 24)}, the picture itself; save it to a file and write that file's path")
    if _ADDRESS.match(image):
        raise BadRecord("image_type", f"{what} is an address, {quoted(image)}; {_PUT_BELOW}")
    if len(image) > _LONGEST_PATH:
        raise BadRecord("image_type", f"{what} is {quoted(image, 24)}, too long for a path; write the path of a file")
    return image


def _it(what: str) -> str:
    return "the key" if what == "image" else "it"


def _turn(turn: Any, number: int) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise BadRecord("turn", f"turn {number} is {_kind(turn)}; write {{from: human or gpt, value: text}}")
    role, text = turn.get("from"), turn.get("value")
    if not isinstance(role, str) or not isinstance(text, str):
        key = "value" if isinstance(role, str) else "from"
        given = f"is {_kind(turn[key])}" if key in turn else f"is missing{keys.another_turn(turn)}"
        raise BadRecord("turn", f"turn {number}: {key} {given}; write {{from: human or gpt, value: text}}")
    if role not in ("human", "gpt"):
        raise BadRecord("role", f"turn {number} is from {quoted(role, 40)}; {_role_remedy(role)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecord("json_encoding", f"turn {number} holds half a character (such as \\ud83d alone); repair the encoding") from None
    return role, text


def _role_remedy(role: str) -> str:
    match role.lower():
        case "system" | "developer":
            return "the template brings its own system text: take the turn out"
        case "tool" | "function" | "observation" | "ipython" | "function_call" | "tool_call":
            return "tools are not taught: take the record out"
        case "user" | "assistant":
            return "write human or gpt (user is human, assistant is gpt)"
    return "write human or gpt"


def _kind(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
