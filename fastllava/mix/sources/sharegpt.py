"""ShareGPT: conversations without pictures, cleaned and cut as Vicuna's were."""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Literal

from pydantic import Field, model_validator

from fastllava.data.tokenizer import Tokenizer
from fastllava.errors import UserError
from fastllava.mix import fields, sharegpt
from fastllava.mix.conversation import Conversation, Pair
from fastllava.mix.keys import FileList, Section, SourceKeys
from fastllava.mix.rows import Row
from fastllava.mix.run import Run
from fastllava.mix.sharegpt import Turn

Long = Literal["first_segment", "leading_pairs", "split", "keep"]


class Files(Section):
    """What is read."""

    conversations: FileList = Field(description="a dump of ShareGPT, or a list of its parts, such as sg_90k_part1.json")


class Rules(Section):
    """How they become conversations."""

    clean: bool = Field(
        default=True, description="FastChat's clean_sharegpt; false: roles are looked at, after the cut, and a last question goes"
    )
    html: bool = Field(default=True, description="the texts are HTML and become Markdown; false for dumps that are Markdown already")
    repeated_numbering: bool = Field(
        default=False, description="true: leave out lists that count 1. and 1. again (FastChat's filter_wrong_format)"
    )
    repeated_digits: bool = Field(default=False, description="true: leave out one digit nine times in a row (FastChat's optional_clean)")
    long: Long = Field(
        default="first_segment",
        description="beyond max_tokens: first_segment of FastChat's split, leading_pairs that fit, split into segments, or keep",
    )
    max_tokens: int = Field(default=2048, ge=16, description="of a conversation, each turn counted with 6 tokens more, as FastChat counts")


class Keys(SourceKeys):
    """ShareGPT."""

    format: Literal["sharegpt"]
    files: Files
    rules: Rules = Field(default_factory=Rules)

    @model_validator(mode="after")
    def _no_images(self) -> "Keys":
        if self.images:
            raise ValueError("images: ShareGPT has no pictures; take the key out")
        return self


def read(keys: Keys, run: Run) -> Iterator[Conversation]:
    """Conversations in the order of the files."""
    rules, seen = keys.rules, set[bytes]()
    tokenizer = run.tokenizer
    if rules.long != "keep" and tokenizer is None:
        remedy = "write tokenizer: with the folder of Vicuna's, or rules.long: keep, as training cuts at data.max_tokens anyway"
        raise UserError(f"sources.{keys.name}: rules.long: {rules.long} counts tokens, and the mix names no tokenizer; {remedy}")

    def dialogue(row: Row) -> tuple[str | int, list[Turn], bool, str]:
        found = fields.an_object(row.value)
        turns = []
        for number, item in enumerate(fields.items(found, "conversations")):
            turn = fields.an_object(item, f"turn {number}")
            turns.append((fields.text(turn, "from"), fields.text(turn, "value")))
        model = fields.text(found, "model") if "model" in found else ""
        return fields.name(found, "id"), turns, found.get("plugins") is not None, model

    for name, turns, plugins, model in run.table(keys.files.conversations, dialogue):
        try:
            kept = _kept(name, turns, plugins, rules, seen)
        except sharegpt.Left as left:
            run.dropped.by_rule(left.reason)
            continue
        if tokenizer is None or rules.long == "keep":
            if not _alternate(kept, run):
                continue
            yield Conversation(name, None, _pairs(kept), extra={"model": model} if model else {})
            continue
        parts = [part for part in _parts(kept, rules, tokenizer) if _alternate(kept[part[0] : part[1]], run)]
        if not parts:
            run.dropped.by_rule("too_long")
        for begin, end in parts:
            yield Conversation(sharegpt.segment_id(name, begin), None, _pairs(kept[begin:end]), extra={"model": model})


def _pairs(turns: Sequence[Turn]) -> list[Pair]:
    return [Pair(turns[at][1], turns[at + 1][1]) for at in range(0, len(turns), 2)]


def _alternate(turns: Sequence[Turn], run: Run) -> bool:
    """Whether human and gpt take turns; a segment in which they do not is counted, as FastChat looks at roles after the split."""
    good = all(role == ("human", "gpt")[number % 2] for number, (role, _) in enumerate(turns))
    run.dropped.by_rule("sharegpt_roles", not good)
    return good


def _kept(name: str | int, turns: Sequence[Turn], plugins: bool, rules: Rules, seen: set[bytes]) -> list[Turn]:
    """The turns that are kept; what was `seen` before is not. Raises sharegpt.Left."""
    if not rules.clean:
        kept = list(turns[: len(turns) // 2 * 2])
        if not kept:
            raise sharegpt.Left("sharegpt_short")
    else:
        kept = sharegpt.cleaned(turns, rules.html)
        marks = [_mark("id", str(name)), _mark(kept[0][1], kept[1][1])]
        if any(mark in seen for mark in marks):
            raise sharegpt.Left("sharegpt_duplicate")
        if plugins:
            raise sharegpt.Left("sharegpt_plugins")
        seen.update(marks)
    if rules.repeated_numbering and sharegpt.repeats_numbering(kept):
        raise sharegpt.Left("sharegpt_numbering")
    if rules.repeated_digits and sharegpt.repeats_digits(kept):
        raise sharegpt.Left("sharegpt_digits")
    return kept


def _mark(*texts: str) -> bytes:
    return blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _parts(turns: Sequence[Turn], rules: Rules, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Which stretches of the turns become conversations."""
    begins = 1 if tokenizer.bos_id is not None else 0
    lengths = [sharegpt.turn_length(len(tokenizer.encode(text)) + begins) for _, text in turns]
    if rules.long == "leading_pairs":
        found = [(0, sharegpt.leading(lengths, rules.max_tokens))]
    else:
        found = sharegpt.split(lengths, rules.max_tokens)
    found = [(begin, end) for begin, end in found if end > begin]
    # Where the first pair is too long, FastChat's first segment is empty, and truncation leaves nothing.
    if rules.long == "first_segment":
        found = [part for part in found[:1] if part[0] == 0]
    return found
