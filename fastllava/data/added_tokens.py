"""Tokens that files beside a sentencepiece model add to its vocabulary: reading them, and finding in a text those that are text.

A special one is a control token, which no text becomes. The others are words: a text that spells one becomes it, as in the
slow tokenizers of transformers 4.37.2 (`PreTrainedTokenizer.tokenize`).
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastllava.console.printable import quoted
from fastllava.errors import UserError

_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")
_MARK = re.compile(r"<\|.*\|>")
_HIGHEST_ID = 2**31 - 1


class Added(NamedTuple):
    """One added token. The last three are the flags of tokenizers' AddedToken."""

    index: int
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class Settings(NamedTuple):
    """What the files beside a tokenizer model say."""

    added: dict[str, Added]
    """By spelling."""
    names: dict[str, str]
    """Spelling of bos_token, eos_token and the others that are named."""
    special: frozenset[str]
    """Spellings of all that are named special."""
    add_bos: bool | None
    """Whether texts begin with bos_token; None where nothing is said."""


class Found(NamedTuple):
    """An added token in a text, and the stretch that it takes up, with white space that it swallows."""

    begin: int
    end: int
    index: int | None
    """None: no token, but the text ends here and another begins."""


class Words:
    """Finds those added tokens in a text that are words of it."""

    def __init__(self, added: Mapping[str, Added], controls: Iterable[str]) -> None:
        self._added = {text: token for text, token in added.items() if not token.special and text not in controls}
        spelled = sorted(self._added, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, spelled))) if spelled else None

    def find(self, text: str) -> list[Found]:
        """In order, none over another; where several begin at a place, the longest."""
        if self._pattern is None:
            return []
        found = []
        for match in self._pattern.finditer(text):
            token = self._added[match[0]]
            begin, end = match.span()
            if token.single_word and (text[begin - 1 : begin] not in ("", " ") or text[end : end + 1] not in ("", " ")):
                # Part of a word: the text stays text, yet two of them, with the spelling on the side where the word goes on.
                border = end if text[begin - 1 : begin] not in ("", " ") else begin
                found.append(Found(border, border, None))
                continue
            if token.lstrip:
                begin = max(len(text[:begin].rstrip()), found[-1].end if found else 0)
            if token.rstrip:
                end = len(text) - len(text[end:].lstrip())
            found.append(Found(begin, end, token.index))
        return found

    def spelling(self) -> dict[int, str]:
        """By id."""
        return {token.index: text for text, token in self._added.items()}


def read_settings(folder: Path) -> Settings:
    """What the files in `folder` say. Raises UserError that names the file."""
    config_file, map_file = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    config, given = read_json(config_file), read_json(map_file)
    names = {key: text for key in _NAMES if (text := _content(config.get(key, given.get(key))))}
    more = [*_listed(config.get("additional_special_tokens")), *_listed(given.get("additional_special_tokens"))]
    special = frozenset([*names.values(), *filter(None, map(_content, more))])
    added: dict[str, Added] = {}
    file = folder / "added_tokens.json"
    for text, index in read_json(file).items():
        # The file has no flags. A mark of conversations is a control token, whatever transformers takes it for there.
        added[text] = Added(_index(file, text, index), text in special or _MARK.fullmatch(text) is not None)
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise UserError(f"{config_file}: added_tokens_decoder is no object; restore the file")
    for index, token in decoder.items():
        text = _content(token) or ""
        flags = token if isinstance(token, dict) else {}
        strips = [flags.get(flag) is True for flag in ("lstrip", "rstrip", "single_word")]
        added[text] = Added(_index(config_file, text, index), text in special or flags.get("special") is True, *strips)
    added.pop("", None)
    add_bos = config.get("add_bos_token")
    return Settings(dict(sorted(added.items())), names, special, add_bos if isinstance(add_bos, bool) else None)


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file, empty where there is none. Raises UserError."""
    try:
        if not path.is_file():
            return {}
        value = json.loads(path.read_bytes())
    except RecursionError:
        raise UserError(f"{path}: cannot be read as JSON (nested too deep); restore the file or take it away") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); restore the file or take it away") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__} where an object is expected; restore the file or take it away")
    return value


def _index(file: Path, text: str, given: Any) -> int:
    """A token's id; added_tokens_decoder has them as keys and so as text."""
    index = int(given) if isinstance(given, str) and given.isdecimal() and len(given) < 12 else given
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index <= _HIGHEST_ID:
        raise UserError(f"{file}: the id of token {quoted(text, 40)} is {quoted(str(given), 40)}; write a whole number from 0 on")
    return index


def _content(token: Any) -> str | None:
    """A token's spelling; the files write it plainly or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
