"""`fastllava answer`: questions through an engine into an answers file, by one process or by several that torchrun starts."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from fastllava.console.speaker import speaker
from fastllava.data.asking import Turn, ask
from fastllava.disk import ready_to_write
from fastllava.distributed.processes import ALONE, Processes, processes
from fastllava.errors import UserError
from fastllava.evaluate.answers_file import AnswersFile, held_answers_file, identify
from fastllava.evaluate.checkpoint import Trained
from fastllava.evaluate.engines import Engine, Prompt, load_engine, rows_of, whole_rows
from fastllava.evaluate.pictures import BadQuestion, load_picture, load_pictures, missing_picture
from fastllava.evaluate.progress import Progress
from fastllava.evaluate.questions import Question, read_questions

MAX_NEW_TOKENS = 1024
"""As the original's model_vqa has it; its loader, for benchmarks of short answers, takes 128."""
_READERS = 4
"""Threads that read pictures, while the engine is at those before."""

Pixels = NDArray[np.uint8]
Got = tuple[str, bool] | BadQuestion
"""An answer, and whether it came to its end; or why there is none."""


@dataclass(frozen=True)
class Outcome:
    """What came of the questions, on the first process; the others know no more than `left_out`."""

    answered: int
    """Questions answered now, not those of an earlier start."""
    unended: int
    """Answers among them that the limit of new tokens has cut."""
    left_out: Sequence[BadQuestion]
    """The questions without an answer."""
    seconds: float


def answer_questions(
    trained: Trained,
    questions: Sequence[Question],
    out: Path,
    *,
    engine: Engine | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    skip_bad: bool = False,
    group: Processes = ALONE,
    console: Console | None = None,
) -> Outcome:
    """Answer `questions` into the file `out`, a line each in their order, greedily; what `out` holds of them already stays.

    engine: transformers, 8 questions at a time, when left out. skip_bad: answer the rest where a question cannot be asked, and list
    those beside `out`. Every process of `group` takes a share; the first writes. Whatever was killed, the bytes in the end are the same.
    Raises UserError that names the question, and when `out` is not an answers file of these questions by this model.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: {max_new_tokens} is no number of tokens; write 1 or more")
    if engine is None:
        from fastllava.evaluate.engines.transformers_engine import TransformersEngine

        engine = TransformersEngine(trained)
    console = console if console is not None and group.first else Console(quiet=True)
    began, say = time.monotonic(), speaker(console)
    with ExitStack() as stack:
        file: AnswersFile | None = None
        with group.together():
            if group.first:
                file = stack.enter_context(held_answers_file(out, questions, _ids(trained, questions, engine, max_new_tokens)))
        todo, bad = group.on_first(lambda: _begin(file, trained, questions, skip_bad))
        before = len(questions) - len(todo) - len(bad)
        if before:
            say(f"{out} holds {before:,} of {len(questions):,} answers already" + (": going on" if todo else ""))
        pool = stack.enter_context(ThreadPoolExecutor(_READERS))
        progress = stack.enter_context(Progress("answered", before, before + len(todo), console))
        work = _Work(trained, engine, questions, max_new_tokens, skip_bad, file, progress)
        unended = 0
        for loaded in _ahead(pool, _shares(todo, engine.window, group), questions, trained):
            with group.together():
                got = work.answer(loaded)
            for number, one in (item for share in group.gather(got) for item in share.items()):
                if number not in got:
                    work.take(number, one)
                if isinstance(one, BadQuestion):
                    bad[number] = one
                else:
                    unended += not one[1]
            if file is not None and bad:
                _list(bad, out)
        if file is not None:
            _list(bad, out)
            file.finish()
    answered = len(todo) - sum(number in bad for number in todo)
    outcome = Outcome(answered, unended, [one for _, one in sorted(bad.items())], time.monotonic() - began)
    _say_what_came(outcome, out, max_new_tokens, say)
    return outcome


def answer_file(
    checkpoint: Path,
    questions: Path,
    images: Path | None,
    out: Path,
    *,
    template: str | None,
    max_new_tokens: int,
    batch_size: int,
    engine: str,
    precision: str,
    skip_bad: bool,
    base: Path | None = None,
    console: Console,
) -> Outcome:
    """`answer_questions` of a questions file, for every process that torchrun started. Raises UserError."""
    if images is not None and not images.is_dir():
        raise UserError(f"--images: {images} is no folder; give the one that the images lie in")
    asked = read_questions(questions, images)
    if not asked:
        raise UserError(f"--questions: {questions} holds no question; write one JSON object of question_id, image and text a line")
    with processes() as group:
        group.on_first(lambda: ready_to_write(out, "--out"))
        say = speaker(console if group.first else Console(quiet=True))
        most = max(len(question.images) for question in asked)
        trained, made = load_engine(checkpoint, engine, template, batch_size, precision, say, group, max(1, most), base)
        return answer_questions(
            trained, asked, out, engine=made, max_new_tokens=max_new_tokens, skip_bad=skip_bad, group=group, console=console
        )


@dataclass(frozen=True)
class _Work:
    """What a process does with its share of the questions."""

    trained: Trained
    engine: Engine
    questions: Sequence[Question]
    max_new_tokens: int
    skip_bad: bool
    file: AnswersFile | None
    """On the first process."""
    progress: Progress

    def answer(self, pictures: Mapping[int, Sequence[Future[Pixels]]]) -> dict[int, Got]:
        """What came of each question, by its number. Raises BadQuestion, unless those are skipped."""
        got: dict[int, Got] = {}
        prompts: dict[int, Prompt] = {}
        for number, shown in pictures.items():
            question = self.questions[number]
            try:
                prompts[number] = self._prompt(question, [picture.result() for picture in shown])
            except BadQuestion as problem:
                if not self.skip_bad:
                    raise
                got[number] = BadQuestion(question, problem.reason)
                self.take(number, got[number])
        numbers, tokenizer, stops = list(prompts), self.trained.tokenizer, self.trained.stops
        for index, tokens in self.engine.generate(list(prompts.values()), self.max_new_tokens):
            ended = bool(tokens) and tokens[-1] in stops
            got[numbers[index]] = tokenizer.decode(tokens[:-1] if ended else tokens).strip(), ended
            self.take(numbers[index], got[numbers[index]])
        return got

    def take(self, number: int, got: Got) -> None:
        """Write what came of a question, on the first process."""
        if self.file is None:
            return
        if isinstance(got, BadQuestion):
            self.file.leave_out(number)
        else:
            self.file.answer(number, got[0], self.trained.name)
        self.progress.advance(1)

    def _prompt(self, question: Question, pixels: Sequence[Pixels]) -> Prompt:
        turn = Turn(question.text, len(pixels))
        try:
            question.text.encode()
        except UnicodeEncodeError:
            raise BadQuestion(question, "its text holds half of a character (a lone surrogate); write the whole one") from None
        prompt = Prompt(ask(self.trained.form, turn, self.trained.tokenizer), pixels)
        rows, most = rows_of(prompt, self.trained), self.trained.model.origin.text.get("max_position_embeddings")
        if len(pixels) > 1:
            # What the original does with too long a prompt about one picture is to lose the question's end.
            rows, most = whole_rows(prompt.ids, self.trained), min(self.trained.max_tokens, most if isinstance(most, int) else rows)
        if isinstance(most, int) and rows > most:
            shown = f" with {len(pixels)} pictures" if len(pixels) > 1 else ""
            raise BadQuestion(question, f"its prompt{shown} has {rows:,} tokens, and the model reads {most:,}; shorten it")
        return prompt


def _ids(trained: Trained, questions: Sequence[Question], engine: Engine, max_new_tokens: int) -> list[str]:
    """An `answer_id` for each question, which changes with whatever may change the answer."""
    how = {
        "model": [trained.name, trained.identity],
        "tokenizer": trained.tokenizer.digest,
        "template": trained.form.name,
        "image_policy": trained.image_policy,
        "max_tokens": trained.max_tokens,
        "precision": str(trained.model.dtype),
        "engine": engine.name,
        "max_new_tokens": max_new_tokens,
    }
    return identify(questions, how)


def _begin(
    file: AnswersFile | None, trained: Trained, questions: Sequence[Question], skip_bad: bool
) -> tuple[list[int], dict[int, BadQuestion]]:
    """The numbers of the questions to answer now, and those left out before that still have to be. Raises BadQuestion."""
    assert file is not None, "the first process has it"  # noqa: S101
    bad: dict[int, BadQuestion] = {}
    for number in file.gaps:
        try:
            load_pictures(questions[number], trained)
        except BadQuestion as problem:
            if not skip_bad:
                raise
            bad[number] = problem
    done = file.done
    waiting = [one for number, one in enumerate(questions) if number not in done]
    if not skip_bad and (missing := [(one, image) for one in waiting if (image := missing_picture(one)) is not None]):
        some = f"; so are those of {len(missing) - 1:,} other questions" if len(missing) > 1 else ""
        raise BadQuestion(missing[0][0], f"image {missing[0][1]}: is not there{some}; put it there, or write --skip-bad to answer the rest")
    return file.begin(set(bad)), bad


def _shares(numbers: Sequence[int], window: int, group: Processes) -> Iterator[Sequence[int]]:
    """This process's share of the questions that all take next, until there are none."""
    for begin in range(0, len(numbers), window * group.world):
        yield numbers[begin : begin + window * group.world][group.rank :: group.world]


def _ahead(
    pool: ThreadPoolExecutor, shares: Iterator[Sequence[int]], questions: Sequence[Question], trained: Trained
) -> Iterator[dict[int, Sequence[Future[Pixels]]]]:
    """The pictures of each share, read while the share before is answered; questions about one file have one array."""

    def start(share: Sequence[int]) -> dict[int, Sequence[Future[Pixels]]]:
        begun: dict[Path | int, Future[Pixels]] = {}
        found = {}
        for number in share:
            question = questions[number]
            keys = [image if isinstance(image, Path) else number for image in question.images]
            for key, image in zip(keys, question.images, strict=True):
                if key not in begun:
                    begun[key] = pool.submit(load_picture, question, image, trained)
            found[number] = [begun[key] for key in keys]
        return found

    coming = [start(share) for share in islice(shares, 1)]
    while coming:
        now = coming.pop()
        coming = [start(share) for share in islice(shares, 1)]
        yield now


def skipped_file(out: Path) -> Path:
    """Where the questions that were left out of the answers file `out` are listed."""
    return out.with_name(f"{out.stem}.skipped.jsonl")


def _list(bad: Mapping[int, BadQuestion], out: Path) -> None:
    """Write the questions left out beside `out`, a line each; no file where there are none."""
    path = skipped_file(out)
    if not bad:
        path.unlink(missing_ok=True)
        return
    beside = path.with_name(f".{path.name}.partial")
    rows = ({"question_id": one.question.id, "line": number + 1, "reason": one.reason} for number, one in sorted(bad.items()))
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    beside.rename(path)


def _say_what_came(outcome: Outcome, out: Path, max_new_tokens: int, say: Any) -> None:
    if outcome.answered:
        speed = outcome.answered / max(outcome.seconds, 1e-9)
        say(f"answered {outcome.answered:,} questions in {outcome.seconds:.1f} s ({speed:.2f} questions/s): {out}")
    if outcome.unended:
        say(f"{outcome.unended:,} of these answers had not ended after {max_new_tokens} tokens; --max-new-tokens is that limit")
    if left_out := outcome.left_out:
        say(f"{len(left_out):,} questions are left out, listed in {skipped_file(out)}; {out.name} has no line for them")
