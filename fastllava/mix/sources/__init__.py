"""Every format that a mix can read, by the word that stands in the config: a module with `Keys` and `read` each."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fastllava.mix.conversation import Conversation
from fastllava.mix.keys import SourceKeys
from fastllava.mix.run import Run
from fastllava.mix.sources import (
    aokvqa,
    boxes,
    captions,
    chat,
    gqa,
    llava,
    messages,
    ocr_vqa,
    refcoco,
    scienceqa,
    sharegpt,
    textcaps,
    visual_genome,
    vqa,
    vqav2,
)

Read = Callable[[Any, Run], Iterator[Conversation | dict[str, Any]]]
"""Conversations, or records that are whole already."""

FORMATS: Mapping[str, tuple[type[SourceKeys], Read]] = {
    "llava": (llava.Keys, llava.read),
    "vqav2": (vqav2.Keys, vqav2.read),
    "okvqa": (vqav2.Keys, vqav2.read),
    "gqa": (gqa.Keys, gqa.read),
    "aokvqa": (aokvqa.Keys, aokvqa.read),
    "ocr_vqa": (ocr_vqa.Keys, ocr_vqa.read),
    "textcaps": (textcaps.Keys, textcaps.read),
    "refcoco": (refcoco.Keys, refcoco.read),
    "visual_genome": (visual_genome.Keys, visual_genome.read),
    "sharegpt": (sharegpt.Keys, sharegpt.read),
    "scienceqa": (scienceqa.Keys, scienceqa.read),
    "vqa": (vqa.Keys, vqa.read),
    "captions": (captions.Keys, captions.read),
    "boxes": (boxes.Keys, boxes.read),
    "chat": (chat.Keys, chat.read),
    "messages": (messages.Keys, messages.read),
}
