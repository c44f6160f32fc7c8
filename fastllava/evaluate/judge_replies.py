"""Replies that a judge gave before, in the files that the official code and others leave them in.

Four forms, told apart by what they hold:

- a JSON list of texts: the replies in the order of the requests, of one run or of several one after another;
- a JSON list of such lists, one a run;
- LLaVA-Bench's reviews (llava/eval/eval_gpt_review_bench.py): JSON lines with `question_id`, `tuple`, `content`, `category`;
- MM-Vet's grades (mm-vet_evaluator): a JSON object of `{"v1_0": {"model": [...], "content": [...], "score": [...]}}`, one place a run.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastllava.console.printable import quoted, shortened
from fastllava.errors import UserError
from fastllava.evaluate.judge import Ask, Reply, Request
from fastllava.evaluate.matching import some

_LARGEST = 256 * 2**20
_REMEDY = (
    "give LLaVA-Bench reviews (JSON lines with question_id and tuple), MM-Vet grades (a JSON object of ids with score lists), "
    "or a JSON list of the replies' texts in the order of the requests"
)


class _Texts:
    """Replies in the order of the requests."""

    def __init__(self, name: str, texts: Sequence[str], one_run: bool) -> None:
        self._name = name
        self._texts = texts
        self._one_run = one_run
        self._taken = 0

    def asks(self, questions: Sequence[int | str]) -> Iterator[Ask]:
        """Give an Ask for each run, until no reply is left."""
        self._taken = 0
        yield self._next
        while not self._one_run and self._taken < len(self._texts):
            yield self._next
        if self._taken < len(self._texts):
            count = len(self._texts)
            raise UserError(
                f"--replies: {self._name} holds {count:,} replies, but {self._taken:,} were asked for; give one for each request"
            )

    def _next(self, request: Request) -> Reply:
        if self._taken == len(self._texts):
            raise UserError(
                f"--replies: {self._name} ends before question {request.question} of run {request.run + 1}, after {self._taken:,} replies; "
                "give one reply for each request, in their order"
            )
        self._taken += 1
        return Reply(self._texts[self._taken - 1])


@dataclass(frozen=True)
class _ById:
    """Replies by question, a mapping for each run."""

    path: Path
    benchmark: str
    runs: Sequence[Mapping[str, Reply]]

    def asks(self, questions: Sequence[int | str]) -> Iterator[Ask]:
        wanted = [str(one) for one in questions]
        have = self.runs[0]
        if missing := [one for one in wanted if one not in have]:
            raise UserError(
                f"--replies: {self.path} has no reply for {len(missing):,} questions ({some(missing)}); judge these questions too"
            )
        if foreign := sorted(set(have) - set(wanted)):
            raise UserError(
                f"--replies: {self.path} has replies for {len(foreign):,} questions that --data does not ask ({some(foreign)}); give theirs"
            )
        for run in self.runs:
            yield lambda request, run=run: run[str(request.question)]


class StoredReplies:
    """The judge whose replies lie in files: all runs of the first, then of the next."""

    reads = False
    abreast = 1
    """As replies of a list are taken in the order of the requests."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read the files. Raises UserError for one that is none of the four forms."""
        self._files = [one for path in paths for one in _read(path)]

    def known(self, benchmark: str) -> Mapping[str, str] | None:
        """The questions of the first file that is by question, and their categories."""
        by_id = [one for one in self._files if isinstance(one, _ById) and one.benchmark == benchmark]
        return {key: str(reply.fields.get("category", "")) for key, reply in by_id[0].runs[0].items()} if by_id else None

    def runs(self, benchmark: str, questions: Sequence[int | str]) -> Iterator[Ask]:
        """Give one Ask for each run in the files."""
        for file in self._files:
            if isinstance(file, _ById) and file.benchmark != benchmark:
                what = "reviews of LLaVA-Bench" if file.benchmark == "llava_bench" else "grades of MM-Vet"
                raise UserError(f"--replies: {file.path} holds {what}, but the benchmark is {benchmark}; give replies of its judge")
            yield from file.asks(questions)


def _read(path: Path) -> list[_Texts] | list[_ById]:
    try:
        if path.stat().st_size > _LARGEST:
            raise UserError(f"--replies: {path} is larger than {_LARGEST // 2**20} MiB; {_REMEDY}")
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is no UTF-8: {error.reason}"
        raise UserError(f"--replies: {path} cannot be read ({reason}); {_REMEDY}") from None
    try:
        found = json.loads(text, object_pairs_hook=_pairs)
    except _Twice as error:
        raise UserError(f"--replies: {path} has the key {quoted(str(error))} twice in one object; keep one of them") from None
    except (ValueError, RecursionError):
        return [_reviews(path, text)]
    if isinstance(found, list) and found and all(isinstance(one, str) for one in found):
        return [_Texts(str(path), found, one_run=False)]
    if isinstance(found, list) and found and all(isinstance(one, list) and one and all(isinstance(t, str) for t in one) for one in found):
        return [_Texts(f"list {number} of {path}", texts, one_run=True) for number, texts in enumerate(found, 1)]
    if isinstance(found, dict) and "question_id" in found:
        return [_reviews(path, text)]
    if isinstance(found, dict) and found and all(isinstance(one, dict) and "score" in one for one in found.values()):
        return [_grades(path, found)]
    if isinstance(found, dict) and found and all(isinstance(one, str) for one in found.values()):
        raise UserError(
            f"--replies: {path} holds a text for each question, as the answers for MM-Vet's judge do, and no replies; {_REMEDY}"
        )
    raise UserError(f"--replies: {path} is no file of replies; {_REMEDY}")


def _reviews(path: Path, text: str) -> _ById:
    """Reviews as JSON lines. A question that comes k times was judged k times."""
    runs: list[dict[str, Reply]] = []
    seen: Counter[str] = Counter()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"--replies: line {number} of {path}"
        try:
            row = json.loads(line, object_pairs_hook=_pairs)
        except _Twice as error:
            raise UserError(f"{where} has the key {quoted(str(error))} twice; keep one of them") from None
        except (ValueError, RecursionError):
            raise UserError(f"{where} is no JSON; {_REMEDY}") from None
        if not isinstance(row, dict) or not isinstance(row.get("question_id"), int | str):
            raise UserError(f"{where} has no question_id; {_REMEDY}")
        content, pair = row.get("content"), row.get("tuple")
        if pair is None and not isinstance(content, str):
            raise UserError(f"{where} has neither tuple nor content; {_REMEDY}")
        if pair is not None and not (isinstance(pair, list) and len(pair) == 2 and all(map(_finite, pair))):
            raise UserError(
                f"{where}: tuple is {shortened(repr(pair))}; write the reference's score and the answer's, [-1, -1] where none was given"
            )
        key = str(row["question_id"])
        if seen[key] == len(runs):
            runs.append({})
        verdict = None if pair is None else (float(pair[0]), float(pair[1]))
        runs[seen[key]][key] = Reply(content if isinstance(content, str) else "", verdict=verdict, fields=row)
        seen[key] += 1
    if not runs:
        raise UserError(f"--replies: {path} holds no reply; {_REMEDY}")
    if uneven := [key for key in runs[0] if key not in runs[-1]]:
        raise UserError(
            f"--replies: {path} has {len(runs)} reviews of question {next(iter(runs[-1]))}, but fewer of others ({some(uneven)}); "
            "give as many of each question, or one file a run"
        )
    return _ById(path, "llava_bench", runs)


def _grades(path: Path, found: Mapping[str, Any]) -> _ById:
    """Grades of MM-Vet, in which each question has a list with a place for each run."""
    counts: dict[int, str] = {}
    for key, grade in found.items():
        scores = grade["score"]
        where = f"--replies: {quoted(key)} of {path}"
        if not isinstance(scores, list) or not scores or not all(_finite(one) and 0 <= one <= 1 for one in scores):
            raise UserError(f"{where}: score is {shortened(repr(scores))}; write a list of numbers from 0 to 1, one a run")
        for column in ("content", "model"):
            texts = grade.get(column)
            if texts is not None and (not isinstance(texts, list) or len(texts) != len(scores)):
                raise UserError(
                    f"{where}: {column} has no {len(scores)} places as score has; write a list with one for each run, or leave it out"
                )
        counts.setdefault(len(scores), key)
    if len(counts) > 1:
        few, many = min(counts), max(counts)
        raise UserError(f"--replies: {path} has {many} runs of {counts[many]}, but {few} of {counts[few]}; judge all questions as often")

    def at(run: int, grade: Mapping[str, Any]) -> Reply:
        text, model = ((grade.get(column) or [None] * (run + 1))[run] for column in ("content", "model"))
        return Reply(
            text if isinstance(text, str) else "", model if isinstance(model, str) else None, verdict=(float(grade["score"][run]),)
        )

    return _ById(path, "mm_vet", [{key: at(run, grade) for key, grade in found.items()} for run in range(next(iter(counts)))])


class _Twice(Exception):
    """A key that a JSON object has twice."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(next(key for place, key in enumerate(keys) if key in keys[:place]))
    return found


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53
