"""What a model is asked, word for word as the original's evaluation programs ask it.

That is not always what training writes: a question keeps the blanks at its ends, the mmtag templates put no tags around the image, and
template v0 writes its turns without blanks and lines (`Conversation.get_prompt` of llava/conversation.py against llava/train/train.py).
Where a question spells a control token, such as </s>, it becomes that token, as it does there; <image> in a question stays text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from fastllava.data.conversation import IMAGE, Segment, encode_segments, literal_pattern, message
from fastllava.data.templates import Template
from fastllava.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Turn:
    """A question, and the answer it has had; None where the model is to answer."""

    question: str
    images: int = 0
    """Pictures that it shows: each is a line of its own before the question. Of several that it spells <image> for, each is there."""
    answer: str | None = None


def ask(form: Template, turns: Sequence[Turn] | Turn, tokenizer: Tokenizer) -> list[int]:
    """Ids of a prompt that ends where the answer to the last of `turns` begins, after <s> where the tokenizer begins texts with it.

    IMAGE_ID stands for each picture.
    """
    return encode_segments(list(_with_controls(asked(form, turns), tokenizer)), tokenizer).ids


def prompt_text(form: Template, turns: Sequence[Turn] | Turn) -> str:
    """The prompt as text, <image> for each picture."""
    return "".join(part.text for part in asked(form, turns))


def asked(form: Template, turns: Sequence[Turn] | Turn) -> list[Segment]:
    """The prompt as segments, whose marks are those of the template and the images."""
    turns = [turns] if isinstance(turns, Turn) else list(turns)
    if form.example is not None:
        turns = [Turn(form.example[0], 0, form.example[1]), *turns]
    parts: list[Segment] = []
    match form.style:
        case "v1":
            parts.append(Segment(f"{form.system} "))
        case "v0":
            parts.append(Segment(f"{form.system}###"))
        case "mpt":
            parts += [Segment("<|im_start|>", mark=True), Segment(f"system\n{form.system}"), Segment("<|im_end|>", mark=True)]
        case "turns" if form.system:
            parts += message(form, "system", [Segment(form.system)])
    for number, turn in enumerate(turns):
        parts += _turn(form, number, turn)
    return parts


def _turn(form: Template, number: int, turn: Turn) -> list[Segment]:
    text = turn.question.strip() if form.trims else turn.question
    shown = [part for _ in range(turn.images) for part in (Segment(IMAGE, mark=True), Segment("\n"))]
    question, answer = [*shown, Segment(text)], turn.answer
    if turn.images > 1 and text.count(IMAGE) == turn.images:
        first, *others = text.split(IMAGE)
        question = [Segment(first), *(part for words in others for part in (Segment(IMAGE, mark=True), Segment(words)))]
    match form.style:
        case "v1":
            # The original writes no blank for a question without a character.
            begin, end = (": ", " ") if shown or turn.question else (":", "")
            asking = [Segment(f"{form.human}{begin}"), *question, Segment(f"{end}{form.gpt}:")]
            return asking if answer is None else [*asking, Segment(f" {answer}"), Segment("</s>", mark=True)]
        case "v0":
            begin, end = (": ", "###") if shown or turn.question else (":", "")
            asking = [Segment(f"{form.human}{begin}"), *question, Segment(f"{end}{form.gpt}:")]
            return asking if answer is None else [*asking, Segment(f" {answer}###")]
        case "mpt":
            start, close = Segment("<|im_start|>", mark=True), Segment("<|im_end|>", mark=True)
            asking = [start, Segment(f"{form.human}\n"), *question, close, start, Segment(f"{form.gpt}\n")]
            return asking if answer is None else [*asking, Segment(answer), close]
        case "llama_2":
            begin = [Segment(form.begin, mark=True)] if form.begin and number else []
            system = f"<<SYS>>\n{form.system}\n<</SYS>>\n\n" if form.system and number == 0 else ""
            asking = [*begin, Segment(f"[INST] {system}"), *question, Segment(" [/INST]")]
            return asking if answer is None else [*asking, Segment(f" {answer} "), Segment("</s>", mark=True)]
        case "turns":
            asking = message(form, form.human, question)
            if answer is None:
                return [*asking, *message(form, form.gpt, None, last=True)]
            return [*asking, *message(form, form.gpt, [Segment(answer.strip() if form.trims else answer)])]
        case _:
            return [*question, Segment("\n" if shown or turn.question else ""), *([] if answer is None else [Segment(f"{answer}\n")])]


def _with_controls(parts: Sequence[Segment], tokenizer: Tokenizer) -> Iterator[Segment]:
    """`parts`, in which each control token that a text spells is a mark."""
    controls = literal_pattern(tokenizer.literals - {IMAGE})
    for mark, run in groupby(parts, key=lambda part: part.mark):
        if mark:
            yield from run
            continue
        text, at = "".join(part.text for part in run), 0
        for found in controls.finditer(text):
            yield Segment(text[at : found.start()])
            yield Segment(found[0], mark=True)
            at = found.end()
        yield Segment(text[at:])
