"""Two forms of a short answer: the one that EvalAI's answers are put into, and the one of the VQA evaluation.

| | EvalAI form | VQA form |
|---|---|---|
| who uses it | TextVQA's score, and the uploads for VQAv2 and VizWiz | the evaluation of VQAv2 |
| first of all | commas and `?` go, `'s` becomes a word of its own | nothing |
| `red,white` | `redwhite` | `red white` |
| `the dog's bed` | `dog 's bed` | `dog's bed` |
| a letter's lower case | Python 3's: `İ` becomes two characters | Python 2.7's: always one |
| digits beside commas and periods | of any script | 0 to 9 |

Both then treat punctuation, periods, number words, articles and contractions alike. They follow llava/eval/m4c_evaluator.py of
haotian-liu/LLaVA and vqaEval.py of GT-Vision-Lab/VQA, oddities included: every published figure was computed with them.
"""

import re
from functools import lru_cache

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIODS = 32
"""Only so many periods go: the official code hands over a flag, whose number is 32, in the place of a count."""
_PERIOD = re.compile(r"\.(?!\d)")
_PERIOD_ASCII = re.compile(r"\.(?!\d)", re.ASCII)
_COMMA_IN_NUMBER = re.compile(r"\d,\d", re.ASCII)
_WORDS_OF_NUMBERS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_WORDS_OF_NUMBERS.split())}
_ARTICLES = {"a", "an", "the"}
_SPELLINGS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll
    how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
    won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in _SPELLINGS.split() for place, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}
"""A word that lacks exactly one of its apostrophes, and the word; one entry of the official table is the other way round."""
_SPACE_OF_PYTHON_2 = "\u180e"
"""A separator that was white space until Unicode 6.3, and so is to Python 2.7."""


@lru_cache(65536)
def evalai_form(text: str) -> str:
    """`text` as TextVQA's score and the uploads for VQAv2 and VizWiz have it."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.strip().replace("\n", " ").replace("\t", " ").strip()
    return _words(_PERIOD.sub("", _punctuation(text, False), _PERIODS).split())


@lru_cache(65536)
def vqa_form(text: str) -> str:
    """`text` as the VQA evaluation has it where the labels of a question are not all the same; `text` went through `vqa_trimmed`."""
    text = _punctuation(text, _COMMA_IN_NUMBER.search(text) is not None)
    text = _lower_of_python_2(_PERIOD_ASCII.sub("", text, _PERIODS))
    return _words(text.replace(_SPACE_OF_PYTHON_2, " ").split())


def vqa_trimmed(text: str) -> str:
    """`text` as the VQA evaluation has it in any case: on one line, without white space at its ends."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    while text.startswith(_SPACE_OF_PYTHON_2) or text.endswith(_SPACE_OF_PYTHON_2):
        text = text.strip(_SPACE_OF_PYTHON_2).strip()
    return text


def _lower_of_python_2(text: str) -> str:
    """`text` in the lower case of Python 2.7, letter by letter.

    Capital letters that Unicode got after 5.2 (Cherokee, Georgian, Adlam and a few Latin ones) have a lower case here and none in
    Python 2.7; they become equal to their lower case on both sides of a comparison.
    """
    return text.lower() if text.isascii() else "".join(letter.lower()[:1] for letter in text)


def _punctuation(text: str, drop: bool) -> str:
    """`text` without its punctuation: a mark goes where `drop` says so or a space is beside it anywhere, else becomes a space."""
    out = text
    for mark in _PUNCTUATION:
        if mark in text:
            out = out.replace(mark, "" if drop or f"{mark} " in text or f" {mark}" in text else " ")
    return out


def _words(words: list[str]) -> str:
    """`words` in one line: numbers as digits, without articles, contractions with their apostrophes."""
    kept = (word for word in (_NUMBERS.get(word, word) for word in words) if word not in _ARTICLES)
    return " ".join(_CONTRACTIONS.get(word, word) for word in kept)
