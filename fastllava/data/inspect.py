"""What records become, for programs (one object each) and for people (text with the supervised part marked)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.text import Text

from fastllava.batch import IMAGE_ID
from fastllava.console.printable import printable
from fastllava.data.checks import BadRecord, Record, check_record
from fastllava.data.conversation import Encoded, encode_record, segments, template
from fastllava.data.marks import check_marks
from fastllava.data.records import Raw, read_records
from fastllava.data.templates import Template
from fastllava.data.tokenizer import Tokenizer

_SUPERVISED = "bold green"


def inspect_records(
    records: Path, tokenizer: Tokenizer, template_name: str, max_tokens: int = 2048, max_images: int = 1
) -> Iterator[dict[str, Any]]:
    """For each record in order {"id", "input_ids", "supervised": [[a, b), ...]} or {"id", "quarantined": reason}.

    IMAGE_ID marks an image. Image files are not looked at; `max_tokens` cuts text-only records, as in the original,
    where one with an image is cut when it has become patches; `max_images` as data.max_images. Raises UserError.
    """
    form = template(template_name)
    check_marks(form, tokenizer)
    for raw in read_records(records):
        try:
            record, encoded = _encode(raw, form, tokenizer, max_tokens, max_images)
        except BadRecord as problem:
            yield {"id": _name(raw), "quarantined": problem.reason}
        else:
            yield {"id": record.id, "input_ids": encoded.ids, "supervised": [list(span) for span in encoded.supervised]}


def render_text(records: Path, tokenizer: Tokenizer, template_name: str, max_tokens: int = 2048, max_images: int = 1) -> Iterator[Text]:
    """For each record in order: the raw turns, the string they become, and its tokens with the supervised ones marked.

    In the token line [brackets] and colour say supervised. Raises UserError.
    """
    form = template(template_name)
    check_marks(form, tokenizer)
    for raw in read_records(records):
        shown = _Block(f"record {raw.index}, line {raw.line}, id {_name(raw)}")
        try:
            record, encoded = _encode(raw, form, tokenizer, max_tokens, max_images)
        except BadRecord as problem:
            yield shown.line(f"quarantined: {problem.reason}: {problem.detail}", "bold red").text
            continue
        shown.line(f"image{'s' * (len(record.images) > 1)}: {', '.join(record.images)}" if record.images else "text-only")
        for number, (role, words) in enumerate(record.turns):
            shown.line(f"{role}{' (left out of the loss)' if number in record.left_out else ''}: {words!r}")
        if record.other_keys:
            shown.line(f"keys that mean nothing here: {', '.join(record.other_keys)}")
        shown.line("becomes: ", "dim not bold", end="")
        for part in segments(record, form):
            shown.add(repr(part.text)[1:-1], _SUPERVISED if part.supervised else "not bold")
        shown.add("\n  tokens: ", "dim not bold")
        _add_tokens(shown, encoded, tokenizer)
        yield shown.text


class _Block:
    """What is shown of one record, grown line by line; nothing in it acts on a terminal."""

    def __init__(self, title: str) -> None:
        self.text = Text(style="bold")
        self.add(title.replace("\n", "\\n") + "\n", "")

    def add(self, words: str, style: str = "not bold") -> "_Block":
        self.text.append(printable(words), style)
        return self

    def line(self, words: str, style: str = "not bold", end: str = "\n") -> "_Block":
        return self.add("  " + words.replace("\n", "\\n") + end, style)


def _encode(raw: Raw, form: Template, tokenizer: Tokenizer, max_tokens: int, max_images: int) -> tuple[Record, Encoded]:
    if raw.problem is not None:
        raise raw.problem
    record = check_record(raw.value, raw.index, max_images)
    return record, encode_record(record, form, tokenizer, max_tokens)


def _add_tokens(shown: _Block, encoded: Encoded, tokenizer: Tokenizer) -> None:
    supervised = {i for begin, end in encoded.supervised for i in range(begin, end)}
    for i, token in enumerate(encoded.ids):
        piece = "<image>" if token == IMAGE_ID else tokenizer.piece(token)
        if i in supervised:
            shown.add(f"[{piece}] ", _SUPERVISED)
        else:
            shown.add(f"{piece} ")
    counted = sum(end - begin for begin, end in encoded.supervised)
    shown.add(f"({len(encoded.ids)} ids, {counted} supervised)\n", "dim not bold")


def _name(raw: Raw) -> str | int:
    name = raw.value.get("id") if isinstance(raw.value, dict) else None
    return name if isinstance(name, (str, int)) and not isinstance(name, bool) else f"#{raw.index}"
