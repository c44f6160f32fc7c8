"""Conversations from files of one's own: LLaVA's from and value, or the role and content of Hugging Face's `messages`."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from fastllava.console.printable import quoted
from fastllava.mix import fields
from fastllava.mix.conversation import IMAGE, BadRow, Conversation, Pair
from fastllava.mix.keys import Section, SourceKeys
from fastllava.mix.rows import Row
from fastllava.mix.run import Run
from fastllava.mix.sources.tables import TableFiles, id_of, image_of, too_many

_HUMAN = frozenset(("human", "user", "prompter"))
_GPT = frozenset(("gpt", "assistant", "model", "bot", "chatgpt"))


class ChatColumns(Section):
    """The names of the columns."""

    turns: str = Field(default="conversations", description="the list of turns")
    role: str = Field(default="from", description="of a turn: who speaks")
    text: str = Field(default="value", description="of a turn: what is said")
    image: str | None = Field(default="image", description="path of the image, or a list of up to max_images; null: there are no images")
    id: str | None = Field(default=None, description="an id of the row; its number in the file when left out")


class MessagesColumns(ChatColumns):
    """The names of the columns, as Hugging Face has them."""

    turns: str = Field(default="messages", description="the list of turns")
    role: str = Field(default="role", description="of a turn: who speaks")
    text: str = Field(default="content", description="of a turn: what is said, a text or a list of parts of type text and image")
    image: str | None = Field(default="images", description="path of the image, or a list of up to max_images; null: there are no images")


class Rules(Section):
    """How they become conversations."""

    system: Literal["refuse", "to_question", "leave_out"] = Field(
        default="refuse", description="a system turn: refuse the record, put its text before the first question, or leave it out"
    )


class Keys(SourceKeys):
    """Conversations of LLaVA's form or nearly."""

    format: Literal["chat"]
    files: TableFiles
    columns: ChatColumns = Field(default_factory=ChatColumns)
    rules: Rules = Field(default_factory=Rules)


class MessagesKeys(SourceKeys):
    """Conversations of Hugging Face's form."""

    format: Literal["messages"]
    files: TableFiles
    columns: MessagesColumns = Field(default_factory=MessagesColumns)
    rules: Rules = Field(default_factory=Rules)


def read(keys: Keys | MessagesKeys, run: Run) -> Iterator[Conversation]:
    """Conversations in the order of the rows."""
    columns = keys.columns

    def dialogue(row: Row) -> Conversation:
        found = fields.an_object(row.value)
        pairs = _pairs(_turns(found, columns), keys.rules)
        image = _image(found, columns.image, keys.files, run)
        placed = any(IMAGE in text for pair in pairs for text in pair)
        return Conversation(id_of(found, columns.id, row), image, pairs, placed)

    return run.table(keys.files.rows, dialogue, keys.files.under)


def _turns(row: Mapping[str, Any], columns: ChatColumns) -> list[tuple[str, str]]:
    """Who speaks, and what. Raises BadRow."""
    given = row.get(columns.turns)
    if isinstance(given, str):
        # A cell of CSV.
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            raise BadRow("field", f"{columns.turns!r} is a text that is no JSON; write a list of turns") from None
    turns = []
    for number, item in enumerate(fields.items({columns.turns: given} if columns.turns in row else row, columns.turns)):
        turn = fields.an_object(item, f"turn {number}")
        turns.append((fields.text(turn, columns.role).lower(), _text(turn, columns.text, number)))
    return turns


def _text(turn: Mapping[str, Any], column: str, number: int) -> str:
    """What a turn says; the image among its parts is a line of its own. Raises BadRow."""
    content = turn.get(column)
    if not isinstance(content, list):
        return fields.text(turn, column)
    parts = []
    for part in content:
        kind = fields.text(fields.an_object(part, f"a part of turn {number}"), "type")
        if kind not in ("text", "image", "image_url"):
            raise BadRow("field", f"turn {number} has a part of type {quoted(kind, 40)}; only text and image are taught")
        parts.append(fields.text(part, "text") if kind == "text" else IMAGE)
    return "\n".join(parts)


def _pairs(turns: list[tuple[str, str]], rules: Rules) -> list[Pair]:
    """Questions with their answers. Raises BadRow."""
    before = ""
    if turns and turns[0][0] in ("system", "developer"):
        if rules.system == "refuse" and turns[0][1].strip():
            raise BadRow("roles", "begins with a system turn; write rules.system: to_question or leave_out")
        before = turns[0][1].strip() if rules.system == "to_question" else ""
        turns = turns[1:]
    if not turns or len(turns) % 2:
        raise BadRow("roles", f"has {len(turns)} turns; a conversation is questions with their answers, so an even number")
    for number, (role, _) in enumerate(turns):
        if role not in (_HUMAN, _GPT)[number % 2]:
            raise BadRow("roles", f"turn {number} is from {quoted(role, 40)}; user and assistant take turns, user first")
    pairs = [Pair(turns[at][1], turns[at + 1][1]) for at in range(0, len(turns), 2)]
    return [Pair(f"{before}\n{pairs[0].question}", pairs[0].answer), *pairs[1:]] if before else pairs


def _image(row: Mapping[str, Any], column: str | None, files: TableFiles, run: Run) -> str | tuple[str, ...] | None:
    """The path of the record's picture, those of several, None where it has none. Raises BadRow."""
    value = None if column is None else row.get(column)
    if column is None or value in (None, "", []):
        return None
    if isinstance(value, list):
        if len(value) > run.max_images:
            raise too_many(len(value), run)
        paths = [image_of({column: one}, column, files, run) for one in value]
        return tuple(paths) if len(paths) > 1 else paths[0]
    return image_of(row, column, files, run)
