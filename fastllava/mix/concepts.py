"""Concept-balanced sampling of captions, as the LLaVA paper describes it for the 595K captions of CC3M.

Count every noun phrase over all captions. Phrases that come less often than `least` are passed over. From the rarest
phrase up, add the captions that hold it; of a phrase that comes more often than `most`, add `most` captions, drawn from
all that hold it. What is taken is the same in whatever order the phrases are looked at.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from pydantic import Field

from fastllava.errors import UserError
from fastllava.mix.keys import Section
from fastllava.mix.run import Run

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_BETWEEN = frozenset(
    re.findall(
        r"\w+",
        """
        a an and any are as at be been being but by can did do does for from had has have he her here hers him his how i if in into is it
        its itself just like may me more most my near no nor not of off on onto or other our out over own she so some such than that the
        their them then there these they this those through to too under up upon very was we were what when where which while who whom
        whose why will with within without would you your
        """,
    )
)
"""Words that stand between noun phrases."""
_BATCH = 1000


class Balance(Section):
    """How captions are balanced."""

    least: int = Field(default=3, ge=1, description="phrases that come less often are passed over")
    most: int = Field(default=100, ge=1, description="at most so many captions of one phrase")
    phrases: Literal["words", "spacy"] = Field(
        default="words", description="words: runs of words without little ones between them; spacy: noun phrases, as in the paper"
    )
    spacy_model: str = Field(default="en_core_web_sm", description="the model of spaCy, where phrases is spacy")


def plain_phrases(caption: str) -> set[str]:
    """Runs of words that no article, preposition, pronoun or auxiliary interrupts: nearly the noun phrases of a short caption."""
    found: set[str] = set()
    for stretch in re.split(r"[^\w\s'\u2019-]|\s-\s", caption.lower()):
        run: list[str] = []
        for word in (*_WORD.findall(stretch), ""):
            if word and word not in _BETWEEN:
                run.append(word)
            elif run:
                found.add(" ".join(run))
                run = []
    return found


class Balancer:
    """Balances the captions of one source."""

    def __init__(self, balance: Balance, run: Run) -> None:
        self._balance, self._run = balance, run
        self._nlp = _spacy(balance.spacy_model) if balance.phrases == "spacy" else None

    def balanced(self, captions: Iterator[tuple[str, str, str]]) -> Iterator[tuple[str, str, str]]:
        """The captions that are taken, in their order, each as (id, image, caption)."""
        kept, holders = self._run.groups(), self._run.groups()
        count = 0
        for batch in _batches(captions):
            for entry, phrases in zip(batch, self._phrases([caption for _, _, caption in batch]), strict=True):
                kept.add("", entry)
                for phrase in sorted(phrases):
                    holders.add(phrase, count)
                count += 1
        taken = np.zeros(count, bool)
        for phrase, holding in holders:
            if len(holding) >= self._balance.least:
                taken[self._run.draw.some(holding, self._balance.most, "balance", phrase)] = True
        self._run.dropped.by_rule("balance", int(count - taken.sum()))
        for number, entry in enumerate(kept.values()):
            if taken[number]:
                yield entry[0], entry[1], entry[2]

    def _phrases(self, captions: list[str]) -> Iterator[set[str]]:
        if self._nlp is None:
            yield from map(plain_phrases, captions)
            return
        for document in self._nlp.pipe(captions):
            yield {" ".join(chunk.text.lower().split()) for chunk in document.noun_chunks}


def _batches(captions: Iterator[tuple[str, str, str]]) -> Iterator[list[tuple[str, str, str]]]:
    batch: list[tuple[str, str, str]] = []
    for caption in captions:
        batch.append(caption)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _spacy(model: str) -> Any:
    """The model. Raises UserError where spaCy or the model is not installed."""
    remedy = f"pip install spacy, then python -m spacy download {model}; or write balance.phrases: words"
    try:
        import spacy  # type: ignore[import-not-found]

        load: Callable[..., Any] = spacy.load
        return load(model, exclude=["ner", "lemmatizer"])
    except (ImportError, OSError):
        raise UserError(f"balance.phrases: spacy needs spaCy and its model {model}, which are not installed; {remedy}") from None
