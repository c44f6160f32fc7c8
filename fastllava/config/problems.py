"""What pydantic finds wrong with a config, in the words of the config keys: what was given and what to write instead."""

import difflib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from fastllava.config.foreign import counterpart
from fastllava.config.strict_yaml import in_yaml
from fastllava.console.printable import shortened

_A_NUMBER = "is no number; write one such as {example}"
_A_WHOLE_NUMBER = "is no whole number; write one such as {example}"
_KEYS_BELOW = "holds no keys; write its keys below it, such as '{first}: VALUE'"
_WORDS = {
    "float_type": _A_NUMBER,
    "float_parsing": _A_NUMBER,
    "finite_number": _A_NUMBER,
    "int_type": _A_WHOLE_NUMBER,
    "int_parsing": _A_WHOLE_NUMBER,
    "int_from_float": _A_WHOLE_NUMBER,
    "bool_type": "is neither true nor false; write one of them",
    "bool_parsing": "is neither true nor false; write one of them",
    "string_type": "is no word; write one, in quotes when it looks like a number",
    "list_type": "is no list; write one such as [{value}]",
    "greater_than": "is too small; write a number above {gt}",
    "greater_than_equal": "is too small; write at least {ge}",
    "less_than": "is too large; write a number below {lt}",
    "less_than_equal": "is too large; write at most {le}",
    "model_type": _KEYS_BELOW,
    "dict_type": "is no implementation; write one for all rooms, such as reference, or below it one for each, such as 'rope: reference'",
}


def in_words(problems: Sequence[Any], keys: Sequence[str], defaults: Mapping[str, Any] = MappingProxyType({})) -> str:
    """One line for each pydantic problem (`ValidationError.errors()`); `keys` are all dotted config keys, `defaults` of some of them."""
    lines: dict[str, str] = {}
    for problem in problems:
        # Of a union's problems the last speaks for all: it is about the most general type.
        key = shortened(".".join(str(part) for part in problem["loc"] if not _is_internal(part)))
        lines[key] = _line(key, problem, keys, defaults)
    return "\n".join(lines.values())


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """'; did you mean ...?' with the dotted key nearest to `word`, or a list of those beside it."""
    section, _, name = word.rpartition(".")
    beside = list(dict.fromkeys(_beside(section, known)))
    elsewhere = [key for key in known if name == key.rpartition(".")[2]]
    by_name = {key.rpartition(".")[2]: key for key in beside}
    close = [by_name[match] for match in difflib.get_close_matches(name, by_name, n=1)]
    if found := [*elsewhere, *close]:
        return f"; did you mean {found[0]}?"
    return f"; write one of {', '.join(beside)}" if beside else did_you_mean(section, known)


def _beside(section: str, known: Sequence[str]) -> list[str]:
    """The keys and sections that lie in `section`, dotted."""
    prefix = f"{section}." if section else ""
    return [prefix + key.removeprefix(prefix).split(".")[0] for key in known if key.startswith(prefix)]


def _is_internal(part: Any) -> bool:
    """Whether a part of a problem's place is a validator's name, not a key."""
    return isinstance(part, str) and ("[" in part or part.startswith("function-"))


def _line(key: str, problem: Any, keys: Sequence[str], defaults: Mapping[str, Any]) -> str:
    kind, given = problem["type"], in_yaml(problem.get("input"))
    match kind:
        case "missing":
            return f"{key}: is missing; write it in the config or as {key}={'pretrain or stage=finetune' if key == 'stage' else 'VALUE'}"
        case "extra_forbidden" | "invalid_key":
            return f"{key}: no such key{counterpart(key.rpartition('.')[2]) or did_you_mean(key, keys)}"
        case "value_error":
            message = str(problem["ctx"]["error"])
            return f"{key}: {message}" if key and not message.startswith(key) else message
        case "literal_error":
            return f"{key}: {given} is not among its values; write {problem['ctx']['expected']}"
    if kind not in _WORDS:
        return f"{key}: {given} does not fit ({problem['msg']})"
    first = next((other for other in keys if other.startswith(f"{key}.")), key).rpartition(".")[2]
    bounds = {name: _plain(bound) for name, bound in problem.get("ctx", {}).items() if name in ("gt", "ge", "lt", "le")}
    usual = "0.03 or 2e-5" if _WORDS[kind] == _A_NUMBER else "128"
    words = _WORDS[kind].format(**bounds, value=given.strip("'"), first=first, example=_plain(defaults.get(key), usual))
    return f"{key}: {given} {words}"


def _plain(number: Any, otherwise: Any = None) -> Any:
    """A number, 0.0 as 0; of what is none `otherwise`."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        return otherwise
    return int(number) if number == int(number) else number
