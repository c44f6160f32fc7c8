"""A record and a template to token ids and the ranges of them that are supervised.

The template is written down as segments, each supervised or not, so the labels come from how the text was made; the
original finds them again by splitting and re-tokenizing the finished text (llava/train/train.py, preprocess_*).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from fastllava.batch import IMAGE_ID
from fastllava.console.printable import quoted
from fastllava.data.checks import BadRecord, Record
from fastllava.data.segments import IMAGE, Segment, in_front, shown
from fastllava.data.templates import TEMPLATES, Template, template
from fastllava.data.tokenizer import Tokenizer

__all__ = ["IMAGE", "TEMPLATES", "Encoded", "Segment", "Template", "encode_record", "encode_segments", "prompt", "segments", "template"]


@dataclass(frozen=True)
class Encoded:
    """A conversation as ids."""

    ids: list[int]
    """Token ids; IMAGE_ID where an image stands."""
    supervised: list[tuple[int, int]]
    """Ascending half-open ranges into `ids`; no image is in one of them."""
    length: int
    """Ids there were before any cut."""


def encode_record(record: Record, form: Template, tokenizer: Tokenizer, max_tokens: int) -> Encoded:
    """The record's ids, and which are supervised, as the original makes them.

    A text-only record is cut at `max_tokens` ids here, as the original's tokenizer call cuts it; one with an image is
    not: it is cut when the image has become patches. Raises BadRecord where the original would raise, mask the whole
    record, take a user's text for a control token, or give the record another one's image.
    """
    encoded = encode_segments(segments(record, form, tokenizer.literals), tokenizer)
    if form.everywhere:
        encoded = _everywhere(encoded, record, form, tokenizer)
    if tokenizer.unk_id is not None and tokenizer.unk_id in encoded.ids:
        at = encoded.ids.index(tokenizer.unk_id)
        raise BadRecord("unknown_token", f"token {at} is unknown to the tokenizer; take the character out, or use a model that knows it")
    if not record.images:
        encoded = cut(encoded, max_tokens)
    if not any(end > max(begin, 1) for begin, end in encoded.supervised):
        raise BadRecord("nothing_supervised", f"no supervised token among the first {max_tokens}; shorten the question")
    return encoded


def cut(encoded: Encoded, length: int) -> Encoded:
    """The first `length` ids."""
    if len(encoded.ids) <= length:
        return encoded
    return Encoded(encoded.ids[:length], [(begin, min(end, length)) for begin, end in encoded.supervised if begin < length], encoded.length)


def prompt(form: Template | str, question: str, images: int, tokenizer: Tokenizer, placed: bool = False) -> list[int]:
    """Ids that ask `question`, ending where the answer begins: the form that training with this template has taught.

    The images stand before the question, each in a line of its own, or where they are `placed` in it, each at its <image>; template
    plain has no questions, so there they stand alone. Whatever else the question spells is text.
    """
    form = template(form) if isinstance(form, str) else form
    question = question.strip() if form.trims else question
    if images and not placed:
        question = in_front(question, images)
    opened = [*_opening(form), *_round(form, 0, shown(question, form) if images else [Segment(question)], None)]
    if form.style == "plain":
        opened = [Segment(IMAGE, mark=True)] * images
    return encode_segments(opened, tokenizer).ids


def segments(record: Record, form: Template, literals: frozenset[str] = frozenset()) -> list[Segment]:
    """The record written out in `form`. Raises BadRecord; `literals`: what no text may spell."""
    turns = record.turns
    if form.style in ("v1", "llama_2", "mpt", "turns") and turns and turns[0][0] == "gpt":
        # The original leaves out an answer that comes before the first question.
        turns = turns[1:]
    if form.trims:
        turns = [(role, text.strip()) for role, text in turns]
    first = len(record.turns) - len(turns)
    _check_turns(turns, form)
    _check_learned(record, turns, form)
    _check_images(record, turns, form)
    # Where the record shows an image, the placeholder is no text, whether or not the tokenizer has a token of that name.
    spelled = literal_pattern((literals | form.separators) - ({IMAGE} if record.images else set()))
    for _, text in turns:
        if found := spelled.search(text):
            raise BadRecord("control_literal", f"the text spells the control token {found[0]}; take it out or spell it otherwise")
    if form.style == "plain":
        marks = [Segment(IMAGE, mark=True)] * len(record.images)
        return [*marks, Segment(turns[1][1], True), Segment("\n", True)]
    written = [(role, _pieces(text, form, record, role == "gpt")) for role, text in turns]
    parts = _opening(form)
    if form.style == "v0":
        for number, (role, pieces) in enumerate(written):
            mark, *rest = _turn_v0(form, role, pieces)
            parts += [mark, *(_unlearned(rest) if number + first in record.left_out else rest)]
        # The original closes with an open turn and supervises it.
        return [*parts, Segment("### ", True)]
    for number in range(0, len(turns), 2):
        _check_separator(form, turns[number][1], turns[number + 1][1])
        both = _round(form, number // 2, written[number][1], written[number + 1][1], number + 2 == len(turns))
        parts += _unlearned(both) if number + 1 + first in record.left_out else both
    return parts


def encode_segments(parts: list[Segment], tokenizer: Tokenizer) -> Encoded:
    """Ids of the segments in order, after <s> where the tokenizer begins texts with it.

    Text between two marks is tokenized as one, and after the image like the start of a text (`tokenizer_image_token`
    of the original, llava/mm_utils.py). A mark that the tokenizer has no token for is text. Where a control token takes the
    blanks behind it along, as Phi-3's do, they become no token.
    """
    ids: list[int] = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ranges: list[tuple[int, int]] = []
    continues = bare = False
    texts: list[str] = []
    supervised: list[bool] = []

    def flush() -> None:
        if bare:
            _strip_front(texts)
        if texts and (any(texts) or not bare):
            new, counts = tokenizer.encode_parts(texts, continues)
            begin = len(ids)
            ids.extend(new)
            for count, yes in zip(counts, supervised, strict=True):
                if yes:
                    _extend(ranges, begin, begin + count)
                begin += count
        texts.clear()
        supervised.clear()

    for part in parts:
        token = None
        if part.mark:
            token = IMAGE_ID if part.text == IMAGE else tokenizer.control(part.text)
        if token is not None:
            flush()
            ids.append(token)
            if part.supervised:
                _extend(ranges, len(ids) - 1, len(ids))
            continues = token != IMAGE_ID
            bare = continues and part.text in tokenizer.swallowing
        elif supervised and supervised[-1] == part.supervised:
            texts[-1] += part.text
        else:
            texts.append(part.text)
            supervised.append(part.supervised)
    flush()
    return Encoded(ids, ranges, len(ids))


def _strip_front(texts: list[str]) -> None:
    """Takes away the blanks that the joined texts begin with."""
    for at, text in enumerate(texts):
        texts[at] = text.lstrip()
        if texts[at]:
            return


def _extend(ranges: list[tuple[int, int]], begin: int, end: int) -> None:
    """Adds [begin, end), joined to the last range where it goes on from there."""
    if ranges and ranges[-1][1] == begin:
        begin = ranges.pop()[0]
    if begin < end:
        ranges.append((begin, end))


def _everywhere(encoded: Encoded, record: Record, form: Template, tokenizer: Tokenizer) -> Encoded:
    """`encoded`, with the tokens that the template supervises wherever they stand, but in answers that are not to be learned.

    They are found by their ids, as LLaVA-NeXT finds them.
    """
    wanted = {tokenizer.control(text) for text in form.everywhere}
    wanted |= {found[0] for text in form.everywhere if len(found := tokenizer.encode(text, continues=True)) == 1}
    learned = _places(encoded)
    left_out: set[int] = set()
    if record.left_out:
        left_out = _places(encode_segments(segments(replace(record, left_out=frozenset()), form), tokenizer)) - learned
    ranges: list[tuple[int, int]] = []
    for i, token in enumerate(encoded.ids):
        if i in learned or (token in wanted and i not in left_out):
            _extend(ranges, i, i + 1)
    return Encoded(encoded.ids, ranges, encoded.length)


def _places(encoded: Encoded) -> set[int]:
    return {i for begin, end in encoded.supervised for i in range(begin, end)}


def _opening(form: Template) -> list[Segment]:
    match form.style:
        case "v0":
            return [Segment(f"{form.system}\n\n")]
        case "mpt":
            return [Segment("<|im_start|>", mark=True), Segment(f"system\n{form.system}"), Segment("<|im_end|>", mark=True)]
        case "turns" if form.system:
            return message(form, "system", [Segment(form.system)])
    return []


def message(form: Template, role: str, text: list[Segment] | None, last: bool = False, learned: bool = False) -> list[Segment]:
    """A message of style turns; `text` None leaves it open.

    `last`: it is the conversation's last answer; `learned`: its end is supervised, and what the template says beside it.
    """
    head, begins, goes_on = form.head.format(role=role), learned and form.head_learned, learned and form.after_learned
    head += form.unthinking if last else ""
    opened = [Segment(part, begins, mark=part in form.marks) for part in re.split(f"({_any_of(form.marks)})", head) if part]
    if text is None:
        return opened
    return [*opened, *text, Segment(form.end, learned, mark=True), *([Segment(form.after, goes_on)] if form.after else [])]


def _round(form: Template, number: int, question: list[Segment], answer: list[Segment] | None, last: bool = True) -> list[Segment]:
    """A question and its answer, the conversation's `last` or not; `answer` None leaves it open."""
    close: list[Segment] = []
    match form.style:
        case "v1":
            ask = [Segment(f"{form.system} {form.human}:" if number == 0 else f"{form.human}:"), Segment(" "), *question]
            ask.append(Segment(f" {form.gpt}:"))
            answer = answer and [Segment(" ", True), *answer]
            close = [Segment("</s>", True, mark=True)]
        case "llama_2":
            system = f"<<SYS>>\n{form.system}\n<</SYS>>\n\n" if form.system and number == 0 else ""
            begin = [Segment(form.begin, mark=True)] if form.begin and number else []
            ask = [*begin, Segment(f"[INST] {system}"), *question, Segment(" [/INST]")]
            answer = answer and [Segment(" ", True), *answer, Segment(" ", True)]
            close = [Segment("</s>", True, mark=True)]
        case "mpt":
            start = Segment("<|im_start|>", mark=True)
            ask = [start, Segment(f"{form.human}\n"), *question, Segment("<|im_end|>", mark=True), start, Segment(f"{form.gpt}\n")]
            close = [Segment("<|im_end|>", True, mark=True)]
        case "turns":
            return [*message(form, form.human, question), *message(form, form.gpt, answer, last, learned=True)]
        case _:
            ask = [*_turn_v0(form, "human", question), Segment(f"### {form.gpt}:")]
    return ask if answer is None else [*ask, *answer, *close]


def _unlearned(parts: list[Segment]) -> list[Segment]:
    return [part._replace(supervised=False) for part in parts]


def _turn_v0(form: Template, role: str, pieces: list[Segment]) -> list[Segment]:
    """A turn of template v0. The original masks all of a question but its first two tokens, which are the ### it begins with."""
    gpt = role == "gpt"
    return [Segment("###", True), Segment(f" {form.gpt if gpt else form.human}: ", gpt), *pieces, Segment("\n", gpt)]


def _pieces(text: str, form: Template, record: Record, supervised: bool) -> list[Segment]:
    """A turn's text with its marks: that of a record's one image at the front (`preprocess_multimodal` of the original), those of
    several where they are. Text-only records hold none.
    """
    if not record.images:
        return [Segment(text, supervised)]
    return shown(in_front(text, 1) if len(record.images) == 1 and IMAGE in text else text, form, supervised)


def _check_turns(turns: list[tuple[str, str]], form: Template) -> None:
    roles = [role for role, _ in turns]
    if "gpt" not in roles:
        raise BadRecord("no_answer", "has no answer of gpt; give it one or take the record out")
    if form.style == "plain":
        if roles != ["human", "gpt"]:
            given = f"has {len(turns)} turns ({', '.join(roles[:4])})"
            raise BadRecord("plain_turns", f"{given}; template plain wants one human and one gpt turn")
        return
    if form.style == "v0":
        # Each turn names its speaker, so the original takes any order here, and silence too.
        return
    for number, role in enumerate(roles):
        if role != ("human", "gpt")[number % 2]:
            raise BadRecord("role_order", f"two {role} turns in a row; join them or write the turn between them")
    if roles[-1] == "human":
        raise BadRecord("unanswered", "ends with a human turn; answer it or take it out")
    for role, text in turns:
        if not text:
            raise BadRecord("empty_turn", f"a {role} turn is empty; write its text or take the round out")


def _check_learned(record: Record, turns: list[tuple[str, str]], form: Template) -> None:
    """Something is learned, and the system text is the template's."""
    first = len(record.turns) - len(turns)
    if record.left_out and all(role == "human" or number + first in record.left_out for number, (role, _) in enumerate(turns)):
        raise BadRecord("nothing_supervised", "every answer says that it is not to be learned; take the record out")
    if record.system and record.system != form.system:
        given = f"has a system text of its own, {quoted(record.system, 40)}, and template {form.name} brings one"
        raise BadRecord("system_text", f"{given}; take the key out, or choose another data.template")


def _check_images(record: Record, turns: list[tuple[str, str]], form: Template) -> None:
    """One <image> for each image. In a text-only record <image> is text, but template plain shows an image always."""
    if not record.images:
        if form.style == "plain":
            raise BadRecord("image_count", "has no image; template plain wants one in every record")
        return
    counts = [text.count(IMAGE) for _, text in turns]
    if (spelled := sum(counts)) != (images := len(record.images)):
        remedy = f"write {IMAGE} once, where the image belongs"
        if images > 1:
            remedy = f"write {IMAGE} once for each image, where it belongs"
        raise BadRecord("image_count", f"{spelled} {IMAGE} in the turns and {images} image{'s'[: images > 1]}; {remedy}")
    if form.style == "plain" and counts[1]:
        raise BadRecord("image_count", f"{IMAGE} stands in the answer; template plain wants it in the human turn")


def _check_separator(form: Template, question: str, answer: str) -> None:
    """The original finds the answer by splitting at these, and masks the whole record where that does not give two parts."""
    if form.style == "v1":
        before, separator, after = f"{form.human}: {question}", f" {form.gpt}: ", answer
    elif form.style == "llama_2":
        before, separator, after = f"[INST] {question} ", "[/INST] ", f"{answer} "
    else:
        return
    if f"{before}{separator}{after}".split(separator) != [before, after]:
        spelled = separator.strip()
        raise BadRecord("separator_in_text", f"the text holds '{spelled}', which the template separates turns with; spell it otherwise")


@lru_cache
def literal_pattern(literals: frozenset[str]) -> re.Pattern[str]:
    """Finds any of the literals; where there are none, nothing."""
    return re.compile(_any_of(literals) or r"(?!)")


def _any_of(literals: Iterable[str]) -> str:
    return "|".join(re.escape(literal) for literal in sorted(literals, key=len, reverse=True))
