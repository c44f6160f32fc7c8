"""What records become, for programs (one object each) and for people (text with the supervised part marked)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.text import Text

from fastllava.batch import IMAGE_ID
from fastllava.data.checks import BadRecord, Record, check_record
from fastllava.data.conversation import Encoded, encode_record, segments, template
from fastllava.data.records import Raw, read_records
from fastllava.data.templates import Template
from fastllava.data.tokenizer import Tokenizer

_SUPERVISED = "bold green"


def inspect_records(records: Path, tokenizer: Tokenizer, template_name: str, max_tokens: int = 2048) -> Iterator[dict[str, Any]]:
    """For each record in order {"id", "input_ids", "supervised": [[a, b), ...]} or {"id", "quarantined": reason}.

    IMAGE_ID marks the image. Image files are not looked at; `max_tokens` cuts text-only records, as in the original,
    where one with an image is cut when it has become patches. Raises UserError.
    """
    form = template(template_name)
    for raw in read_records(records):
        try:
            record, encoded = _encode(raw, form, tokenizer, max_tokens)
        except BadRecord as problem:
            yield {"id": _name(raw), "quarantined": problem.reason}
        else:
            yield {"id": record.id, "input_ids": encoded.ids, "supervised": [list(span) for span in encoded.supervised]}


def render_text(records: Path, tokenizer: Tokenizer, template_name: str, max_tokens: int = 2048) -> Iterator[Text]:
    """For each record in order: the raw turns, the string they become, and its tokens with the supervised ones marked.

    In the token line [brackets] and colour say supervised. Raises UserError.
    """
    form = template(template_name)
    for raw in read_records(records):
        text = Text(f"record {raw.index}, line {raw.line}, id {_name(raw)}\n", style="bold")
        try:
            record, encoded = _encode(raw, form, tokenizer, max_tokens)
        except BadRecord as problem:
            yield text.append(f"  quarantined: {problem.reason}: {problem.detail}\n", style="bold red")
            continue
        text.append(f"  image: {record.image}\n" if record.image is not None else "  text-only\n", style="not bold")
        for role, words in record.turns:
            text.append(f"  {role}: {words!r}\n", style="not bold")
        text.append("  becomes: ", style="dim not bold")
        for part in segments(record, form):
            text.append(repr(part.text)[1:-1], style=_SUPERVISED if part.supervised else "not bold")
        text.append("\n  tokens: ", style="dim not bold")
        yield text.append(_tokens(encoded, tokenizer)).append("\n")


def _encode(raw: Raw, form: Template, tokenizer: Tokenizer, max_tokens: int) -> tuple[Record, Encoded]:
    if raw.problem is not None:
        raise raw.problem
    record = check_record(raw.value, raw.index)
    return record, encode_record(record, form, tokenizer, max_tokens)


def _tokens(encoded: Encoded, tokenizer: Tokenizer) -> Text:
    text = Text(style="not bold")
    supervised = {i for begin, end in encoded.supervised for i in range(begin, end)}
    for i, token in enumerate(encoded.ids):
        piece = "<image>" if token == IMAGE_ID else tokenizer.piece(token)
        if i in supervised:
            text.append(f"[{piece}] ", style=_SUPERVISED)
        else:
            text.append(f"{piece} ")
    counted = sum(end - begin for begin, end in encoded.supervised)
    return text.append(f"({len(encoded.ids)} ids, {counted} supervised)", style="dim not bold")


def _name(raw: Raw) -> str | int:
    name = raw.value.get("id") if isinstance(raw.value, dict) else None
    return name if isinstance(name, (str, int)) and not isinstance(name, bool) else f"#{raw.index}"
