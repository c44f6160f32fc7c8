"""The rules of the mix, each a function of its own: how annotations become conversations.

What the LLaVA-1.5 paper says of them, and what it leaves open, is in docs/mix.md.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeVar

from fastllava.mix.conversation import IMAGE, Pair
from fastllava.mix.draw import Draw
from fastllava.mix.instructions import DESCRIBE_REGION, LOCATE_PHRASE, OCR_TOKENS

T = TypeVar("T")
Answer = Literal["most_common", "first", "random"]
Caption = Literal["first", "random", "all"]
PromptAt = Literal["first", "every", "none"]
Regions = Literal["random", "describe", "locate"]
PlaceImage = Literal["random", "before", "after"]


def capitalised(answer: str) -> str:
    """The answer with a capital first letter, as the released file has VQA answers; the rest stays as it is."""
    return answer[:1].upper() + answer[1:]


def answer_of_many(answers: Sequence[str], how: Answer, draw: Draw, key: object) -> str:
    """One of the answers that several people gave; of equally common ones the one that comes first."""
    if how == "first":
        return answers[0]
    if how == "random":
        return draw.one(answers, "answer", key)
    return Counter(answers).most_common(1)[0][0]


def with_prompt(pairs: Sequence[Pair], prompt: str, at: PromptAt = "first") -> list[Pair]:
    """The format prompt on a line of its own after the first question, as the released file has it, or after every one."""
    if not prompt or at == "none":
        return list(pairs)
    return [Pair(f"{pair.question}\n{prompt}", pair.answer) if at == "every" or number == 0 else pair for number, pair in enumerate(pairs)]


def multiple_choice(question: str, choices: Sequence[str], correct: int) -> Pair:
    """The question with a line for each choice, and the letter of the right one."""
    lines = [f"{letter(number)}. {choice}" for number, choice in enumerate(choices)]
    return Pair("\n".join([question, *lines]), letter(correct))


def letter(number: int) -> str:
    """A for 0, B for 1 and so on."""
    return chr(ord("A") + number)


def rotated(choices: Sequence[T], correct: int, by: int) -> tuple[list[T], int]:
    """The choices shifted to the left by `by` places, those in front to the end, and where the right one has come to."""
    by %= len(choices)
    return [*choices[by:], *choices[:by]], (correct - by) % len(choices)


def segments(pairs: Sequence[T], fewer_than: int) -> Iterator[Sequence[T]]:
    """Stretches of fewer than `fewer_than` pairs, in order; the last one takes the rest."""
    size = fewer_than - 1
    return (pairs[begin : begin + size] for begin in range(0, len(pairs), size))


def region_pair(phrase: str, box: str, form: Regions, draw: Draw, *key: object) -> Pair:
    """A region as a question for its description or for its place; which one is drawn where `form` is random."""
    if form == "random":
        form = draw.one(("describe", "locate"), "region", *key)
    if form == "describe":
        return Pair(DESCRIBE_REGION.format(box=box), phrase)
    # The sentence closes with one full stop, also where the phrase brings its own.
    return Pair(LOCATE_PHRASE.format(phrase=phrase.rstrip(". ") or phrase), box)


def some_captions(captions: Sequence[T], which: Caption, draw: Draw, key: object) -> list[T]:
    """The captions of an image that are taken."""
    if which == "all":
        return list(captions)
    return [captions[0] if which == "first" else draw.one(captions, "caption", key)]


def with_ocr_tokens(prompt: str, tokens: Sequence[str], always: bool = True) -> str:
    """The prompt, and in a line after it the words that were read in the picture; `always`: that line without words, too."""
    return f"{prompt}\n{OCR_TOKENS}{', '.join(tokens)}" if tokens or always else prompt


def with_image(question: str, where: PlaceImage, draw: Draw, key: object) -> str:
    """The question with the picture in a line before or after it, drawn where `where` is random, as LCS-558K has it."""
    before = where == "before" or (where == "random" and draw.below(2, "place", key) == 0)
    return f"{IMAGE}\n{question}" if before else f"{question}\n{IMAGE}"


def joined(texts: Iterable[str]) -> str:
    """Texts with single spaces between their words, as a phrase on one line."""
    return " ".join(" ".join(texts).split())
