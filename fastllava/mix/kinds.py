"""Which of the mix's parts a record belongs to, by its image's folder and its prompts: also in a file that does not say."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastllava.mix.conversation import IMAGE
from fastllava.mix.instructions import DESCRIBE_REGION, LCS_558K, LETTER, LOCATE_PHRASE, OCR_TOKENS, ONE_SENTENCE, SHORT_ANSWER

_DESCRIBE, _LOCATE = DESCRIBE_REGION.partition("{")[0], LOCATE_PHRASE.partition("{")[0]
_LCS_558K = frozenset(LCS_558K)
_BY_FOLDER = {"gqa": "GQA", "ocr_vqa": "OCR-VQA", "textvqa": "TextCaps", "vg": "Visual Genome"}

PUBLISHED: Mapping[str, int] = {
    "LLaVA-Instruct": 157_712,
    "ShareGPT (no image)": 40_688,
    "VQAv2 and OKVQA": 82_783 + 8_998,
    "GQA": 72_140,
    "OCR-VQA": 80_000,
    "A-OKVQA": 66_160,
    "TextCaps": 21_953,
    "RefCOCO": 48_447,
    "Visual Genome": 86_417,
}
"""Records of llava_v1_5_mix665k.json by kind, 665,298 in all (its author in LLaVA's issue 702)."""


def prompt_of(question: str) -> str:
    """The name of the format prompt that the question has, 'none' where it has none of those that are known."""
    text = question.replace(IMAGE, "").strip()
    if text.endswith(SHORT_ANSWER):
        return "short answer"
    if text.endswith(LETTER):
        return "letter"
    if text.startswith(_DESCRIBE):
        return "describe region"
    if text.startswith(_LOCATE):
        return "locate phrase"
    if text.startswith(ONE_SENTENCE):
        return "one sentence with OCR tokens" if OCR_TOKENS.strip() in text else "one sentence"
    return "stage 1 instruction" if text in _LCS_558K else "none"


def prompts_of(record: Mapping[str, Any]) -> list[str]:
    """`prompt_of` each question of the record, in order."""
    return [prompt_of(turn["value"]) for turn in record["conversations"] if turn["from"] == "human"]


def kind_of(record: Mapping[str, Any], prompts: Sequence[str]) -> str:
    """The part of the mix: a key of PUBLISHED, or the image's first folder.

    VQAv2 and OKVQA look the same: questions about COCO's images with the same prompt.
    """
    image = record.get("image")
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if not isinstance(image, str):
        return "ShareGPT (no image)" if image is None else "several images"
    folder = image.partition("/")[0] if "/" in image else "."
    if folder in _BY_FOLDER:
        return _BY_FOLDER[folder]
    if "stage 1 instruction" in prompts:
        return "captions of stage 1"
    if folder != "coco":
        return folder
    if "letter" in prompts:
        return "A-OKVQA"
    if "describe region" in prompts or "locate phrase" in prompts:
        return "RefCOCO"
    return "VQAv2 and OKVQA" if "short answer" in prompts else "LLaVA-Instruct"
