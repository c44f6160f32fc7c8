"""Reads the fields of an annotation: each is there and of its type, or the annotation is refused with the field's name."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastllava.console.printable import quoted
from fastllava.mix.conversation import BadRow


def an_object(value: Any, what: str = "the annotation") -> Mapping[str, Any]:
    """The value as an object. Raises BadRow, as all here do."""
    if not isinstance(value, dict):
        raise BadRow("field", f"{what} is {kind(value)}, not an object")
    return value


def text(row: Mapping[str, Any], key: str) -> str:
    """A text, or a number as one: answers such as 2 are written without quotes in some files."""
    value = _there(row, key)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return a_text(value, quoted(key))


def a_text(value: Any, what: str) -> str:
    """A text that can be written in UTF-8."""
    if not isinstance(value, str):
        raise BadRow("field", f"{what} is {kind(value)}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow("field", f"{what} holds half a character; repair the encoding") from None
    return value


def texts(row: Mapping[str, Any], key: str) -> list[str]:
    """A list of texts; a single text is a list of one."""
    value = _there(row, key)
    if isinstance(value, str):
        return [a_text(value, quoted(key))]
    return [a_text(item, f"item {number} of {quoted(key)}") for number, item in enumerate(items(row, key))]


def items(row: Mapping[str, Any], key: str) -> Sequence[Any]:
    """A list."""
    value = _there(row, key)
    if not isinstance(value, list):
        raise BadRow("field", f"{quoted(key)} is {kind(value)}, not a list")
    return value


def whole(row: Mapping[str, Any], key: str) -> int:
    """A whole number that is not negative, also where a text spells it."""
    value = _there(row, key)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise BadRow("field", f"{quoted(key)} is {kind(value)}, not a whole number from 0 on")
    return value


def number(row: Mapping[str, Any], key: str) -> float:
    """A finite number, also where a text spells it."""
    value = _there(row, key)
    try:
        found = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        found = None
    if found is None or abs(found) > 1e9 or found != found:
        raise BadRow("field", f"{quoted(key)} is {kind(value)}, not a number")
    return int(found) if isinstance(value, int) else found


def name(row: Mapping[str, Any], key: str) -> str | int:
    """An id: a text or a whole number."""
    value = _there(row, key)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise BadRow("field", f"{quoted(key)} is {kind(value)}, neither a text nor a whole number")
    return a_text(value, quoted(key)) if isinstance(value, str) else value


def _there(row: Mapping[str, Any], key: str) -> Any:
    if key not in row:
        has = ", ".join(quoted(str(other), 30) for other in list(row)[:12]) or "nothing"
        raise BadRow("field", f"{quoted(key)} is missing; it holds {has}")
    return row[key]


def kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    names = {dict: "an object", list: "a list", bool: "true or false", bytes: "bytes"}
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"the text {quoted(value, 40)}"
    return names.get(type(value)) or (f"the number {value}" if isinstance(value, (int, float)) else type(value).__name__)
