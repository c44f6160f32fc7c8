"""ShareGPT's conversations cleaned as Vicuna's were, by FastChat's rules: what is kept, and what its text becomes.

Source: FastChat at 0e6d3e4, `clean_sharegpt`, `split_long_conversation`, `filter_wrong_format` and `optional_clean`; results are
equal, the code is not FastChat's.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

BLOCKED_WORDS = ("openai", "chatgpt")
"""A conversation in which one of these occurs is left out."""
_BLOCKED_ANSWER = "Too many requests in 1 hour. Try again later."
_FEWEST_CHARACTERS = 16
_LONGEST_TURN = 500_000
"""Characters: no one has written more, and readers of HTML take their time over what is made to keep them busy."""
_MOST_LOOKED_AT = 20_000_000
"""Characters: the parser of HTML looks for the end of each open tag up to the end of the text, which takes two seconds for so many."""
_TURN_OVERHEAD = 6
"""Tokens that FastChat adds to each turn for its name and its end."""

# What the pages that ShareGPT saved have in them beside the conversation.
_CODE = re.compile(r"```\s*(.*?)(?:Copy code)+(.+?)\s*?```", re.DOTALL)
_COPY_BEFORE_END = re.compile(r"Copy code\s*```")
_COUNTER = re.compile(r"\d+ / \d+")
_COPIED = re.compile(r"Copy\d+ chars / \d+ words")
_NUMBERED_TWICE = re.compile(r"\n1\. [^2]*\n1\. ")
_LONG_DIGITS = re.compile(r"(\d)\1{8}")

Turn = tuple[str, str]
"""Who speaks, human or gpt, and what."""


class Left(Exception):
    """The conversation is left out; `reason` is a key of `reasons.BY_RULE`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def cleaned(turns: Sequence[Turn], html: bool = True) -> list[Turn]:
    """The turns that are kept, as Markdown, an even number beginning with human. Raises Left.

    `html`: the texts are HTML, as in the dumps of web pages; what has been turned into Markdown already is not turned again.
    """
    kept = list(turns)
    if len(kept) > 1 and kept[0][0] != "human":
        kept = kept[1:]
    if len(kept) > 1 and kept[-1][0] == "human":
        kept = kept[:-1]
    if len(kept) <= 1:
        raise Left("sharegpt_short")
    found: list[Turn] = []
    for number, (role, text) in enumerate(kept):
        if role != ("human", "gpt")[number % 2]:
            raise Left("sharegpt_roles")
        if any(word in text.lower() for word in BLOCKED_WORDS):
            raise Left("sharegpt_blocked")
        new = markdown(text) if html else text.strip()
        if not new or not new[0].isprintable():
            # An answer that failed: nothing after it belongs to the conversation.
            break
        if role == "gpt" and new.startswith(_BLOCKED_ANSWER):
            raise Left("sharegpt_blocked")
        found.append((role, new))
    # Characters of a question whose answer failed count, too.
    if sum(len(text) for _, text in found) < _FEWEST_CHARACTERS or len(found) < 2:
        raise Left("sharegpt_short")
    return found[: len(found) // 2 * 2]


def markdown(html: str) -> str:
    """A turn's HTML as Markdown, without the page's buttons and counters. Raises Left for HTML that cannot be read."""
    from bs4.builder import ParserRejectedMarkup
    from markdownify import markdownify

    closed = html.rfind(">")
    if len(html) > _LONGEST_TURN or html.count("<", closed + 1) * (len(html) - closed) > _MOST_LOOKED_AT:
        raise Left("sharegpt_html")
    # Tags that would stand in the way of code blocks and of underscores.
    try:
        text = markdownify(_without_tags(_without_tags(html, "<div"), "<span")).strip()
    except (ParserRejectedMarkup, AssertionError, RecursionError):
        raise Left("sharegpt_html") from None
    text = _with_code_blocks(text)
    if counter := _COUNTER.match(text):
        text = text[counter.end() :]
    return _without_empty_code(_COPIED.sub("", text)).replace("\n\n\n", "\n").strip()


# Each of the next three is what one expression of FastChat's says, but takes no longer than the text is long.


def _without_tags(html: str, begin: str) -> str:
    """The text without what reads `begin`, such as <div, to the next > on its line."""
    parts, at = [], 0
    while (start := html.find(begin, at)) >= 0:
        line = html.find("\n", start)
        end = html.find(">", start, len(html) if line < 0 else line)
        if end >= 0:
            parts.append(html[at:start])
            at = end + 1
        elif line < 0:
            break
        else:
            parts.append(html[at:line])
            at = line
    return "".join([*parts, html[at:]])


def _with_code_blocks(text: str) -> str:
    """Code blocks whose first line is a language and a button, with the language where Markdown has it."""
    # A block needs a button, something after it, and an end: one that begins later than the last such button is none.
    last = text.rfind("Copy code", 0, max(0, text.rfind("```") - 1))
    parts, at = [], 0
    while (start := text.find("```", at)) >= 0 and start + 3 <= last:
        found = _CODE.match(text, start)
        if found is None:
            break
        parts += [text[at:start], f"```{found[1]}\n{found[2]}\n```"]
        at = found.end()
    return "".join([*parts, text[at:]])


def _without_empty_code(text: str) -> str:
    """The text without code blocks that end with their button, which begin on the line that it is on."""
    parts, at = [], 0
    for end in _COPY_BEFORE_END.finditer(text):
        line = text.rfind("\n", at, end.start()) + 1
        start = text.find("```", max(at, line), end.start())
        if start >= 0:
            parts.append(text[at:start])
            at = end.end()
    return "".join([*parts, text[at:]])


def repeats_numbering(turns: Sequence[Turn]) -> bool:
    """Whether a list in a turn counts 1. and 1. again without a 2 between them."""
    return any(_NUMBERED_TWICE.search(text) for _, text in turns)


def repeats_digits(turns: Sequence[Turn]) -> bool:
    """Whether a turn holds one digit nine times in a row."""
    return any(_LONG_DIGITS.search(text) for _, text in turns)


def turn_length(n_tokens: int) -> int:
    """FastChat's length of a turn whose text has so many tokens, <s> among them."""
    return n_tokens + _TURN_OVERHEAD


def split(lengths: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Half-open ranges of turns, each of `most` tokens at most, cut between pairs, as FastChat cuts a long conversation.

    A last pair that overflows its range is lost, and so is a single one that is too long; one in the middle stands alone, whatever its
    length. A range may be empty where the very first pair is too long.
    """
    ranges: list[tuple[int, int]] = []
    begin = held = 0
    whole = len(lengths) // 2 * 2
    for at in range(0, whole, 2):
        pair = lengths[at] + lengths[at + 1]
        if held + pair > most:
            ranges.append((begin, at))
            begin, held = at, 0
        elif at == whole - 2:
            ranges.append((begin, whole))
        held += pair
    return ranges


def leading(lengths: Sequence[int], most: int) -> int:
    """How many turns from the beginning, in pairs, have `most` tokens at most together."""
    held = 0
    for at in range(0, len(lengths) // 2 * 2, 2):
        held += lengths[at] + lengths[at + 1]
        if held > most:
            return at
    return len(lengths) // 2 * 2


def segment_id(name: str | int, begin: int) -> str:
    """The id of the part of a conversation that begins with turn `begin`."""
    return f"{name}_{begin}"


def turns_of(conversations: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """The turns of a record whose fields have been checked."""
    return [(turn["from"], turn["value"]) for turn in conversations]
