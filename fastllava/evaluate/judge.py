"""Judges: who says what an answer is worth where no rule can, as GPT-4 does for LLaVA-Bench and MM-Vet."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastllava.console.printable import shortened
from fastllava.errors import UserError

NEEDED = "a judge is needed: give --replies FILE for stored replies, or --judge MODEL to ask one"

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Request:
    """What a judge is asked: one chat completion."""

    question: int | str
    """The id of the question, as the benchmark's files have it."""
    run: int
    """Which judging of the same answers, from 0: a judge that is asked twice may say two things."""
    attempt: int
    """0; more where a benchmark asks again because it could not read the reply."""
    messages: Sequence[Mapping[str, str]]
    """`role` and `content` each; empty for a judge that does not read them."""
    temperature: float
    max_tokens: int


@dataclass(frozen=True)
class Reply:
    """What a judge says."""

    text: str
    model: str | None = None
    """The model that the server says it is; None where nothing says it."""
    address: str | None = None
    """The host that was asked."""
    date: str | None = None
    """The day it was asked on, YYYY-MM-DD in UTC."""
    verdict: tuple[float, ...] | None = None
    """What the official code made of the text, where a file of the official code says so."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What such a file says besides."""


Ask = Callable[[Request], Reply]


class Judge(Protocol):
    """Who is asked: a model behind an address, or replies that it gave before."""

    reads: bool
    """Whether it reads the messages of a request; stored replies do not."""
    abreast: int
    """How many requests it takes at once."""

    def known(self, benchmark: str) -> Mapping[str, str] | None:
        """The ids of the questions that it has replies to, with their categories, where it can tell; for a folder without questions."""
        ...

    def runs(self, benchmark: str, questions: Sequence[int | str]) -> Iterator[Ask]:
        """Give one Ask for each judging of all `questions`. Raises UserError when the replies are not for that benchmark or for them."""
        ...


def make_judge(
    replies: Sequence[Path],
    model: str | None,
    base_url: str | None,
    cache: Path,
    runs: int = 1,
    say: Callable[[str], None] | None = None,
) -> Judge:
    """The judge that `--replies FILE ...`, or `--judge MODEL --base-url URL`, stand for.

    `cache` is the file that keeps what the model replied, so that the same command goes on after a stop; `runs` how often the model
    judges all answers; `say` gets a line about the progress now and then. Raises UserError when it is not one of the two.
    """
    if replies and model is not None:
        raise UserError("--replies and --judge exclude each other; give stored replies or a model to ask")
    if replies and base_url is not None:
        raise UserError("--base-url: stored replies are asked nowhere; leave it out, or give --judge MODEL in place of --replies")
    if runs < 1:
        raise UserError(f"the judge cannot judge {runs} times; write 1 or more")
    if replies:
        from fastllava.evaluate.judge_replies import StoredReplies

        return StoredReplies(replies)
    if model is None:
        raise UserError(f"{NEEDED}; --base-url URL says where, when it is not OpenAI")
    from fastllava.evaluate.judge_openai import OpenAIJudge

    return OpenAIJudge(model, base_url, cache, runs, say)


def judging(replies: Iterable[Reply], runs: int, published: str) -> tuple[dict[str, Any], list[str]]:
    """Who judged, where and when, for Score.judge, and what to warn of.

    `published` is the model that the published figures were judged by. Figures of two judges are not comparable.
    """
    asked = {(one.model, one.address) for one in replies}
    models, addresses = (sorted({each for each in column if each is not None}) for column in zip(*asked, strict=True))
    dates = sorted({one.date for one in replies if one.date is not None})
    name = " and ".join(models) or "a judge that the replies do not name"
    where = f" at {' and '.join(addresses)}" if addresses else ""
    when = f" on {dates[0]}" if len(dates) == 1 else f" from {dates[0]} to {dates[-1]}" if dates else ""
    often = "" if runs == 1 else f", mean of {runs} runs"
    note = f"judged by {name}{where}{when}{often}; compare only with figures of the same judge (the published ones are of {published})"
    found = {"models": models, "addresses": addresses, "dates": dates, "runs": runs, "note": note}
    warnings = []
    if len(asked) > 1:
        parts = ", ".join(sorted(f"{model or 'not named'}{f' at {address}' if address else ''}" for model, address in asked))
        warnings.append(
            f"replies of different judges are mixed ({shortened(parts)}): the figures are of none of them; judge all answers by one"
        )
    return found, warnings


def each(items: Sequence[_Item], work: Callable[[_Item], _Result], abreast: int) -> list[_Result]:
    """`work` of every item, in the order of `items`, `abreast` at a time. After the first error no further item is begun.

    Raises the error of the earliest item that had one, once the items in work are done. Ctrl-C does not wait for them.
    """
    if abreast <= 1:
        return [work(item) for item in items]
    results: dict[int, _Result] = {}
    errors: dict[int, BaseException] = {}
    left = iter(enumerate(items))
    taking = threading.Lock()

    def worker() -> None:
        while True:
            with taking:
                place, item = next(left, (None, None)) if not errors else (None, None)
            if place is None:
                return
            try:
                results[place] = work(item)  # pyright: ignore[reportArgumentType]
            except BaseException as error:
                errors[place] = error

    # Daemons: a process that is told to stop does not wait for a judge that is slow.
    workers = [threading.Thread(target=worker, daemon=True) for _ in range(min(abreast, len(items)))]
    for one in workers:
        one.start()
    for one in workers:
        while one.is_alive():
            one.join(0.2)
    if errors:
        raise errors[min(errors)]
    return [results[place] for place in range(len(items))]
