"""A conversation on its way into the mix, and the record that it becomes."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

IMAGE = "<image>"


class Pair(NamedTuple):
    """A question, or whatever the model is asked, and what it is to answer."""

    question: str
    answer: str


class BadRow(Exception):
    """An annotation that cannot be used. `reason` is a key of `reasons.REASONS`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def checked_pair(question: str, answer: str) -> Pair:
    """The pair of a question about a picture, each with text and without the picture's mark. Raises BadRow.

    So one bad question does not take the others of its picture with it.
    """
    for what, text in (("question", question), ("answer", answer)):
        if not text.strip():
            raise BadRow("empty", f"the {what} is empty")
        if IMAGE in text:
            raise BadRow("image_word", f"the {what} spells {IMAGE}, which stands for the picture; spell it otherwise")
    return Pair(question, answer)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Pairs about a picture, about several, or about none."""

    id: str | int
    image: str | tuple[str, ...] | None
    """Path below the source's folder of images, or those of several."""
    pairs: list[Pair]
    placed: bool = False
    """Whether the text says already where each image stands; otherwise each stands in a line before the first question."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further keys of the record."""


def record_of(conversation: Conversation, folder: str) -> dict[str, Any]:
    """The LLaVA record; `folder` goes before the image's path. Raises BadRow for what training could not take."""
    pairs = conversation.pairs
    if not pairs:
        raise BadRow("no_pairs", "holds no question with its answer")
    image = conversation.image
    images = () if image is None else image if isinstance(image, tuple) else (image,)
    spelled = sum(text.count(IMAGE) for pair in pairs for text in pair)
    if spelled != len(images) * conversation.placed:
        own = "the record's one picture" if len(images) < 2 else f"each of the record's {len(images)} pictures"
        raise BadRow("image_word", f"the text spells {IMAGE} {spelled} times; it may stand for {own} alone")
    turns = []
    for number, (question, answer) in enumerate(pairs):
        if images and not conversation.placed and number == 0:
            question = f"{IMAGE}\n" * len(images) + question
        elif not question.strip():
            raise BadRow("empty", f"question {number} is empty")
        if not answer.strip():
            raise BadRow("empty", f"the answer to question {number} is empty")
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    record: dict[str, Any] = {"id": conversation.id}
    if images:
        paths = [f"{folder}/{path}" if folder else path for path in images]
        record["image"] = paths if len(paths) > 1 else paths[0]
    return {**record, **conversation.extra, "conversations": turns}
