"""What the keys of a record mean that are not those of LLaVA's format: some change what is learned, the others are metadata.

A key that would change what is learned is honoured or refused; one that means nothing here is counted by `prepare`. Each
judgement is a reason of `checks.REASONS` and a detail.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from fastllava.console.printable import quoted

Problem = tuple[str, str]
"""A reason of `checks.REASONS`, and a detail."""
Kind = Literal["media", "loss", "unclear_loss", "system", "unsupported", "other"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MEDIA = _words("image img picture pic photo video audio speech sound frames media visual pixel pixels")
_SECOND_MEDIA = re.compile(r"(video|audio)s?(_(path|file|url|name))?|images|(second_|other_)image|(image|img)_?([2-9]|\d\d+)")
"""Beside `image`: a picture or sound more, where the others tell of the picture that is there (image_id, image_size)."""
_ENDINGS = "jpe?g|png|webp|gif|bmp|tiff?|avif|heic|mp4|avi|mov|webm|mkv|mpe?g|wav|mp3|flac|ogg|m4a|npy"
_FILE = re.compile(rf"\.({_ENDINGS})(\?.*)?$|^data:", re.IGNORECASE)
_PLACES = ("<image>", "<video>", "<audio>", "<img>")
_LOSS = _words(
    "train training trainable trained do_train train_on train_on_turn is_trained learn learnable supervise supervised loss loss_mask "
    "loss_weight loss_scale compute_loss calculate_loss with_loss use_loss has_loss weight sample_weight turn_weight token_weight"
)
_UNCLEAR_LOSS = _words(
    "mask masked is_masked label_mask ignore ignored ignore_loss no_loss skip skip_loss exclude excluded train_detail training_detail "
    "untrained freeze"
)
_SYSTEM = _words("system system_prompt system_message system_text sys_prompt system_instruction")
_UNSUPPORTED = {
    "tools are not taught": "tools tool functions function_call function_calls tool_calls tool_choice",
    "preferences are not learned": "chosen rejected preference preferences chosen_response rejected_response chosen_conversations "
    "rejected_conversations rejected_messages rejected_images kto_tag",
    "earlier rounds are turns of conversations": "history",
    "the turns of a record are those of conversations": "messages conversation dialog dialogue turns",
}
_WHY_UNSUPPORTED = {key: why for why, keys in _UNSUPPORTED.items() for key in _words(keys)}
_OTHER_FORMS = {
    "messages": "OpenAI's form",
    "instruction": "Alpaca's form",
    "query": "ms-swift's older form",
    "question": "a question with its answer",
    "caption": "a picture with its caption",
    "prompt": "a prompt with its answer",
    "conversation": "the key is conversations",
    "conversations": "the key is conversations",
    "dialog": "the key is conversations",
    "chosen": "a preference",
}
_ROLES = {"user": "human", "human": "human", "assistant": "gpt", "gpt": "gpt", "bot": "gpt", "model": "gpt"}
_SYNONYMS = {"role": "from", "speaker": "from", "content": "value", "text": "value"}
_LONGEST_KEY = 60


def record_problem(record: Mapping[str, Any], others: Iterable[str], texts: Iterable[str]) -> Problem | None:
    """Why the record with the other keys `others` means what is not done here, or None. A system text is not judged here."""
    has_image = "image" in record
    for key in others:
        value = record[key]
        kind = kind_of(key)
        if _is_empty(value):
            continue
        if kind == "media" and value is not False and value != 0:
            if not has_image:
                return (
                    "image_key",
                    f"has the key {name_of(key)} and no 'image'; write its path under 'image', or a list of paths, or leave the key out",
                )
            if _SECOND_MEDIA.fullmatch(key.lower()) and value not in (record["image"], [record["image"]]):
                return "image_key", f"has {name_of(key)} beside 'image'; write all its pictures in one list there, or leave the key out"
        elif kind in ("loss", "unclear_loss"):
            if (learned := _is_learned(kind, value)) is None and (kind == "loss" or _is_flag(value)):
                return "loss_flag", f"the record says {name_of(key)}: {_brief(value)}; records are not weighed: leave the key out"
            if learned is False:
                return "loss_flag", f"the record says {name_of(key)}: {_brief(value)}, so it is left out; take it out, or the key"
        elif kind == "system":
            if not isinstance(value, str):
                return "system_text", f"{name_of(key)} is no text; take the key out, as the template brings its system text"
        elif kind == "unsupported":
            return "unsupported_key", f"has {name_of(key)}: {_WHY_UNSUPPORTED[key.lower()]}; take the key out, or the record"
    if not has_image and any(place in text for text in texts for place in _PLACES):
        for key in others:
            if _names_a_file(record[key]):
                return "image_key", f"shows a picture in its text and names a file under {name_of(key)}; write its path under 'image'"
    return None


def turn_problem(turn: Mapping[str, Any], others: Iterable[str], number: int, images: Sequence[str]) -> Problem | None:
    """Why the turn of a record that shows `images` means what is not done here, or None; its loss flags are read by `learned`."""
    for key in others:
        value, kind = turn[key], kind_of(key)
        if _is_empty(value):
            continue
        if kind == "media" and isinstance(value, (str, list, dict)) and ([value] if isinstance(value, str) else value) != [*images]:
            return (
                "image_key",
                f"turn {number} has {name_of(key)}; the paths of a record's pictures stand beside its id, under 'image'",
            )
        if kind == "system":
            return "system_text", f"turn {number} has {name_of(key)}; the template brings its system text: take the key out"
        if kind == "unsupported":
            return "unsupported_key", f"turn {number} has {name_of(key)}: {_WHY_UNSUPPORTED[key.lower()]}; take the key out, or the record"
        meant = _SYNONYMS.get(key.lower())
        same = value if meant == "value" else _ROLES.get(value) if isinstance(value, str) else None
        if meant and turn[meant] not in (value, same):
            return "turn", f"turn {number} has both '{meant}' and {name_of(key)}, and they differ; keep '{meant}'"
    return None


def learned(turn: Mapping[str, Any], others: Iterable[str], number: int) -> tuple[bool | None, Problem | None]:
    """What the turn's flags say of learning it: yes, no, or None where there is none. The problem: they are not clear."""
    said: bool | None = None
    for key in others:
        kind, value = kind_of(key), turn[key]
        if kind not in ("loss", "unclear_loss") or value is None:
            continue
        found = _is_learned(kind, value)
        if found is None or said not in (None, found):
            what = f"turn {number} says {name_of(key)}: {_brief(value)}"
            why = "another key of it says the opposite" if found is not None else "that is neither learned nor left out"
            return None, ("loss_flag", f"{what}, and {why}; write train: true or train: false")
        said = found
    if said and turn.get("from") == "human":
        return None, ("loss_flag", f"turn {number} is a question and says that it is learned; only answers are: take the key out")
    return said, None


def another_form(record: Mapping[str, Any]) -> str:
    """What a record without conversations seems to be, as the tail of a sentence."""
    for key in record:
        if form := _OTHER_FORMS.get(key.lower()):
            return f" (has {name_of(key)}: {form})"
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return f" (if the records lie under {name_of(key)}, write that list alone)"
    return ""


def another_turn(turn: Mapping[str, Any]) -> str:
    """What a turn without from or value seems to be, as the tail of a sentence."""
    if "role" in turn or "content" in turn:
        return " (role and content are OpenAI's form: user is human, assistant is gpt)"
    return ""


def kind_of(key: str) -> Kind:
    """What a key other than LLaVA's is about."""
    return _kind_of(key[:_LONGEST_KEY])


def means_nothing(key: str) -> bool:
    """Whether a key that was not objected to says nothing here."""
    return kind_of(key) in ("other", "media", "unclear_loss")


@lru_cache(maxsize=4096)
def _kind_of(key: str) -> Kind:
    name = key.lower()
    if name in _LOSS:
        return "loss"
    if name in _UNCLEAR_LOSS:
        return "unclear_loss"
    if name in _SYSTEM:
        return "system"
    if name in _WHY_UNSUPPORTED:
        return "unsupported"
    words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", key).lower())
    return "media" if any(word in _MEDIA or word.removesuffix("s") in _MEDIA for word in words) else "other"


def name_of(key: str) -> str:
    """A key in quotes, shortened."""
    return quoted(key, _LONGEST_KEY)


def _is_learned(kind: Kind, value: Any) -> bool | None:
    """Whether a flag's value says to learn (True) or not to (False); None: it is not clear."""
    if kind == "loss" and isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    return None


def _is_flag(value: Any) -> bool:
    """Whether the value may be one of a flag: of a record, mask and the like may name a file as well."""
    return isinstance(value, (bool, int, float)) or (
        isinstance(value, list) and all(isinstance(item, (bool, int, float)) for item in value)
    )


def _is_empty(value: Any) -> bool:
    """Nothing is said by it. A flag's false and 0 do say something, but not of a picture or a tool."""
    return value is None or value == "" or value == [] or value == {}


def _names_a_file(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and _names_a_file(value[0])
    return isinstance(value, str) and _FILE.search(value) is not None


def _brief(value: Any) -> str:
    """A value as JSON writes it, shortened."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value:g}" if isinstance(value, float) else quoted(str(value), 20).strip("'")
    return quoted(value, 20) if isinstance(value, str) else "a list" if isinstance(value, list) else "an object"
