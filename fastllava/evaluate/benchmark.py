"""What a benchmark is: its questions, how its answers are scored, and the file that its server takes."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from fastllava.errors import UserError
from fastllava.evaluate.answers import Answers, read_answers
from fastllava.evaluate.judge import NEEDED, Judge
from fastllava.evaluate.questions import Question

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."


class Missing(UserError):
    """Files of a benchmark that are not there; the message names them and where to get them."""


class ServerScored(UserError):
    """Answers that only a server can score; the message names it and the file to upload."""


class JudgeNeeded(UserError):
    """Answers that only a judge can score, and none was given."""


@dataclass(frozen=True)
class Score:
    """What answers are worth."""

    figures: Mapping[str, float]
    """By the names of `score --json`, as the official code has them before it rounds for printing."""
    questions: list[dict[str, Any]]
    """A row for each judged answer: `question_id`, `line` (that of the Answer, or None when there is none), `score` in [0, 1], and
    `verdict` where the official code has one.
    """
    warnings: list[str] = field(default_factory=list)
    """Where the official code would have given another figure, and which."""
    judge: Mapping[str, Any] | None = None
    """Who judged, where and when (fastllava.evaluate.judge.judging), `note` being a line for people; None where a rule decides."""


class Benchmark(ABC):
    """A benchmark of the original's scripts/v1_5/eval. `data` is its folder, laid out as in playground/data/eval."""

    name: ClassVar[str]
    """As `--benchmarks` and `score` take it."""
    title: ClassVar[str]
    """As papers write it."""
    folder: ClassVar[str]
    """Below playground/data/eval."""
    max_new_tokens: ClassVar[int]
    headline: ClassVar[str]
    """The figure that is published: a key of Score.figures."""
    published: ClassVar[Mapping[str, float]]
    """The original's figures by size, "7b" and "13b" (docs/MODEL_ZOO.md), in the unit that papers print."""
    unit: ClassVar[float] = 1.0
    """What `figures[headline]` is multiplied by to be in that unit."""
    noise: ClassVar[str] = ""
    """What is known of how far two right runs may be apart; empty when nothing is."""
    server: ClassVar[str] = ""
    """Who scores what cannot be scored here; empty when all can."""
    source: ClassVar[str]
    """Where its files come from, for the message about missing ones."""

    @abstractmethod
    def questions(self, data: Path) -> list[Question]:
        """All questions that the original asks, in its order. Raises Missing, and UserError for a file that is not as it should be."""

    @abstractmethod
    def score(self, data: Path, answers: Answers) -> Score:
        """The official figures. Raises Missing when the labels are not there, UserError for answers that cannot be scored."""

    def read(self, path: Path) -> Answers:
        """The answers in `path`: an answers file, or another format in which results of this benchmark are published. Raises UserError."""
        return read_answers(path)

    def upload(self, data: Path, answers: Answers, out: Path) -> list[Path]:
        """Write the files that the benchmark's server or its official code takes into the folder `out`; none when it has none."""
        return []

    def need(self, path: Path) -> Path:
        """`path` when it is there. Raises Missing that says where it comes from."""
        if not path.exists():
            raise Missing(f"{self.name}: {path} is not there; {self.source}")
        return path


class JudgedBenchmark(Benchmark):
    """A benchmark whose answers are judged by a model."""

    published_judge: ClassVar[str]
    """The model that judged for the published figures."""

    @abstractmethod
    def judged(self, data: Path, answers: Answers, judge: Judge, rules: Path | None = None) -> Score:
        """The official figures by `judge`, with Score.judge set. `rules` is the file with the judge's instruction, by default in `data`.

        Raises Missing for files that are not there, UserError for answers or replies that cannot be scored.
        """

    def score(self, data: Path, answers: Answers) -> Score:
        """Raise JudgeNeeded: there is no figure without a judge."""
        raise JudgeNeeded(f"{self.name}: {NEEDED}")
