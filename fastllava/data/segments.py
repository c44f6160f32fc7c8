"""Stretches of a conversation, and how the images among its texts become marks."""

from typing import NamedTuple

from fastllava.data.templates import Template

IMAGE = "<image>"


class Segment(NamedTuple):
    """A stretch of a conversation."""

    text: str
    supervised: bool = False
    mark: bool = False
    """A control token or an image, not text."""


def in_front(text: str, images: int) -> str:
    """The text after a line for each of the images, wherever it spells <image>: `preprocess_multimodal` of the original, with one."""
    return (f"{IMAGE}\n" * images + text.replace(IMAGE, "").strip()).strip()


def shown(text: str, form: Template, supervised: bool = False) -> list[Segment]:
    """A text whose every <image> is an image, each where it stands."""
    before, after = ("<Image>", "</Image>") if form.mmtag else ("", "")
    parts: list[Segment] = []
    pieces = text.split(IMAGE)
    for number, words in enumerate(pieces):
        if number:
            parts.append(Segment(IMAGE, mark=True))
        begin, end = after if number else "", before if number + 1 < len(pieces) else ""
        parts.append(Segment(begin + words + end, supervised))
    return [part for part in parts if part.text]
