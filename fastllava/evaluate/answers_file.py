"""An answers file in the making: one process writes it, in the order of the questions, and a killed run goes on where it stopped.

Each line says by its `answer_id` what it answers and how (`identify`), so what a file holds is known line by line, without anything
beside it. Questions that were left out are gaps; when one of them can be answered later, what comes after it is kept in a file beside
this one until its turn comes again.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fastllava.disk import held_alone
from fastllava.errors import UserError
from fastllava.evaluate.questions import Question

_REMEDY = "give another --out, or remove it to answer anew"


def identify(questions: Sequence[Question], how: Mapping[str, object]) -> list[str]:
    """The `answer_id` of each question: 22 digits of a hash of `how` it is answered, of the question and of its number."""
    given = json.dumps(how, sort_keys=True)
    asked = ([number, one.id, one.text, one.prompt, dict(one.fields)] for number, one in enumerate(questions))
    return [hashlib.sha256(f"{given}\n{json.dumps(row, sort_keys=True, default=str)}".encode()).hexdigest()[:22] for row in asked]


class AnswersFile:
    """The file `path` while its questions, whose ids `identify` gave, are answered. Use `held_answers_file` to have it alone."""

    def __init__(self, path: Path, file: BinaryIO, questions: Sequence[Question], ids: Sequence[str]) -> None:
        self._path, self._file, self._ids = path, file, ids
        self._questions, self._numbers = questions, {one: number for number, one in enumerate(ids)}
        self._before = path.with_name(f".{path.name}.before")
        found, end = self._read(path, file.read())
        file.truncate(end)
        file.seek(end)
        self._written = list(found)
        self._held: dict[int, bytes] = dict(self._read(self._before, self._before.read_bytes())[0]) if self._before.exists() else {}
        for number in found:
            self._held.pop(number, None)
        self._found, self._passed, self._order = found, set[int](), iter(range(0))
        self._next: int | None = None

    @property
    def done(self) -> set[int]:
        """The numbers of the questions that it holds an answer to."""
        return self._found.keys() | self._held.keys()

    @property
    def gaps(self) -> list[int]:
        """The numbers of the questions without an answer before the last that has one."""
        done = self.done
        return [number for number in range(max(done, default=-1)) if number not in done]

    def begin(self, left_out: set[int]) -> list[int]:
        """The numbers of the questions that are to be answered now: all without an answer, but those `left_out`."""
        settled = self.done | left_out
        todo = [number for number in range(len(self._ids)) if number not in settled]
        if todo and self._written and todo[0] < self._written[-1]:
            self._set_aside(todo[0])
        last = self._written[-1] if self._written else -1
        self._order = iter([number for number in range(last + 1, len(self._ids)) if number not in left_out])
        self._next = next(self._order, None)
        self._write_on()
        return todo

    def answer(self, number: int, text: str, model: str) -> None:
        """Take the answer to a question; it is written when those before it are."""
        question = self._questions[number]
        line = {
            "question_id": question.id,
            "prompt": question.prompt,
            "text": text,
            "answer_id": self._ids[number],
            "model_id": model,
            "metadata": {},
            **question.fields,
        }
        self._held[number] = json.dumps(line).encode() + b"\n"
        self._write_on()

    def leave_out(self, number: int) -> None:
        """Write no line for a question."""
        self._passed.add(number)
        self._write_on()

    def finish(self) -> None:
        """Wait until the disk has all of it."""
        os.fsync(self._file.fileno())
        self._before.unlink(missing_ok=True)

    def _write_on(self) -> None:
        while self._next is not None and (self._next in self._held or self._next in self._passed):
            if (line := self._held.pop(self._next, None)) is not None:
                # One write, so that a kill leaves whole lines and at most one cut.
                self._file.write(line)
            self._next = next(self._order, None)
        self._file.flush()

    def _set_aside(self, first: int) -> None:
        """Keep the lines from question `first` on beside the file, and take them out of it."""
        kept = {number: line for number, line in self._found.items() if number < first}
        later = {number: line for number, line in self._found.items() if number > first} | self._held
        with self._before.open("wb") as file:
            file.writelines(line for _, line in sorted(later.items()))
            file.flush()
            os.fsync(file.fileno())
        self._file.seek(sum(map(len, kept.values())))
        self._file.truncate()
        self._found, self._written, self._held = kept, list(kept), later

    def _read(self, path: Path, data: bytes) -> tuple[dict[int, bytes], int]:
        """The whole lines of `data` by the number of their question, and how many bytes they are. Raises UserError for any other line."""
        found: dict[int, bytes] = {}
        last = -1
        *lines, cut = data.split(b"\n")
        for number, line in enumerate(lines, 1):
            row = _object(line)
            asked = self._numbers.get(str(row.get("answer_id")), -1)
            if asked <= last:
                raise UserError(f"--out: {path} holds {self._what_is_wrong(row, number)}; {_REMEDY}")
            found[asked], last = line + b"\n", asked
        if not self._may_be_cut(cut, last):
            raise UserError(f"--out: {path} ends in what is no beginning of an answer (line {len(lines) + 1}); {_REMEDY}")
        return found, sum(map(len, found.values()))

    def _may_be_cut(self, cut: bytes, last: int) -> bool:
        """Whether `cut`, bytes without an end of line, can be the beginning of a line for one of the questions after `last`."""
        cut = cut.rstrip(b"\0")
        begins = (_begin_of(one) for one in self._questions[last + 1 :])
        return not cut or any(cut.startswith(begin) or begin.startswith(cut) for begin in begins)

    def _what_is_wrong(self, row: Mapping[str, object], number: int) -> str:
        if not {"question_id", "text", "answer_id"} <= row.keys():
            return f"what is no answers file (line {number})"
        if _begin_of(row) not in {_begin_of(one) for one in self._questions}:
            return f"answers to other questions (line {number})"
        if str(row["answer_id"]) in self._numbers:
            return f"answers in another order (line {number})"
        return f"answers of another model, template, precision, engine or limit of new tokens (line {number})"


@contextmanager
def held_answers_file(path: Path, questions: Sequence[Question], ids: Sequence[str]) -> Iterator[AnswersFile]:
    """The answers file at `path`, made when it is not there, for this process alone.

    Raises UserError when it cannot be written, another process is writing it, or it holds anything but answers of these ids.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
    except OSError as error:
        raise UserError(f"--out: {path} cannot be written ({error.strerror}); give a file that can") from None
    with file:
        if not held_alone(file):
            raise UserError(f"--out: another run is writing to {path}; wait for it or give another file")
        yield AnswersFile(path, file, questions, ids)


def _begin_of(one: Question | Mapping[str, object]) -> bytes:
    """How the line for a question begins: all that does not depend on its answer."""
    question, prompt = (one.id, one.prompt) if isinstance(one, Question) else (one.get("question_id"), one.get("prompt"))
    return json.dumps({"question_id": question, "prompt": prompt}).encode().removesuffix(b"}")


def _object(line: bytes) -> dict[str, object]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}
