"""MME: two questions about each picture in 14 categories (the original's convert_answer_to_mme.py; MME's eval_tool/calculation.py)."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fastllava.errors import UserError
from fastllava.evaluate.answers import Answer, Answers
from fastllava.evaluate.benchmark import SHORT_ANSWER, Benchmark, Score
from fastllava.evaluate.matching import listed, some
from fastllava.evaluate.questions import Question, read_questions
from fastllava.evaluate.readings import otherwise, yes_or_no
from fastllava.evaluate.shipped import result_tables, table_lines

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_YES_OR_NO = "Please answer yes or no."
_BREAKS_A_TABLE = re.compile(r"[\t\n\r]")

Labels = list[tuple[tuple[str, str, str], str]]
"""Category, file and question, and the label: yes or no. One question may stand there twice."""


@dataclass(frozen=True)
class _Judged:
    """An answer beside its label."""

    answer: Answer
    category: str
    file: str
    """The picture's name, with .txt behind it."""
    question: str
    """As the label's file words it."""
    label: str

    @property
    def right(self) -> bool:
        return verdict(self.answer.text) == self.label.lower()


def verdict(text: str) -> str:
    """What the official code takes `text` for: yes or no when that is in its first four characters, otherwise `other`."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


class MME(Benchmark):
    """Perception (of 2,000, the figure that is published) and cognition (of 800)."""

    name = "mme"
    title = "MME (perception)"
    folder = "MME"
    max_new_tokens = 128
    headline = "perception"
    published: ClassVar[Mapping[str, float]] = {"7b": 1510.7, "13b": 1531.3}
    noise = "20 points between right runs, the original's author says"
    source = (
        "llava_mme.jsonl is in the original's eval.zip (its docs/Evaluation.md); MME_Benchmark_release_version/ comes from "
        "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
    )

    def questions(self, data: Path) -> list[Question]:
        """The questions of llava_mme.jsonl."""
        return read_questions(self.need(data / "llava_mme.jsonl"), data / "MME_Benchmark_release_version")

    def read(self, path: Path) -> Answers:
        """An answers file, or the folder eval_tool/answers/<run> of tables that the official code makes of one."""
        return result_tables(path)

    def score(self, data: Path, answers: Answers) -> Score:
        """Points of each category and their sums. The two questions about a picture find each other by the picture's name."""
        rows = answers.whole()
        asked = self._labels(data, rows)
        labels = dict(asked)
        judged = [_judged(answer, labels) for answer in rows]
        if silent := [name for name in (*PERCEPTION, *COGNITION) if name not in {one.category for one in judged}]:
            raise UserError(f"--answers: {answers.path} answers nothing of {some(silent)}; give the answers to all 14 categories")
        last = {(one.category, one.file, one.question): one for one in judged}
        missing = [key for key in labels if key not in last]
        times = Counter(key[:2] for key, _ in asked)
        if odd := [f"{category}/{file}" for (category, file), count in times.items() if count != 2]:
            raise UserError(f"mme: there are not two questions about {some(odd)}; get MME_Benchmark_release_version again: {self.source}")
        figures = _sums(_by_picture(asked, {key: one.right for key, one in last.items()}))
        said = {"perception": figures["perception"], "cognition": figures["cognition"]}
        questions = [
            {"question_id": one.answer.id, "line": one.answer.line, "category": one.category, "label": one.label.lower()}
            | {"verdict": verdict(one.answer.text), "score": float(one.right)}
            for one in judged
        ] + [
            {"question_id": f"{category}/{file}", "line": None, "category": category, "label": labels[category, file, question].lower()}
            | {"verdict": None, "score": 0.0}
            for category, file, question in missing
        ]
        warnings = _warnings(judged, missing, said)
        if odd := [(one.answer.id, one.answer.text) for one in judged if _plain(one.answer) != verdict(one.answer.text)]:
            plain = {key: _plain(one.answer) == one.label.lower() for key, one in last.items()}
            warnings.append(otherwise(odd, "perception", figures["perception"], _sums(_by_picture(asked, plain))["perception"]))
        return Score(figures, questions, warnings)

    def upload(self, data: Path, answers: Answers, out: Path) -> list[Path]:
        """The tables <category>.txt that MME's calculation.py reads. A line break or tab in an answer would break them: a blank."""
        rows = answers.whole()
        labels = dict(self._labels(data, rows))
        tables: dict[str, list[str]] = {}
        for one in (_judged(answer, labels) for answer in rows):
            cells = (one.file, one.question, one.label, _BREAKS_A_TABLE.sub(" ", one.answer.text))
            tables.setdefault(one.category, []).append("\t".join(cells) + "\n")
        out.mkdir(parents=True, exist_ok=True)
        for category, lines in tables.items():
            (out / f"{category}.txt").write_text("".join(lines), encoding="utf-8", newline="\n")
        return [out / f"{category}.txt" for category in tables]

    def _labels(self, data: Path, rows: Sequence[Answer]) -> Labels:
        """The labels in MME_Benchmark_release_version, else those of eval_tool/Your_Results, else those that tables of answers hold."""
        folder, template = data / "MME_Benchmark_release_version", data / "eval_tool" / "Your_Results"
        if folder.is_dir():
            labels = _release(folder)
        elif template.is_dir():
            labels = _template(template)
        elif all("label" in answer.fields for answer in rows):
            labels = [((*_place(answer), answer.prompt), answer.fields["label"]) for answer in rows]
        else:
            labels = _release(self.need(folder))
        if wrong := [f"{category}/{file}" for (category, file, _), label in labels if label.lower() not in ("yes", "no")]:
            raise UserError(f"mme: a label of {some(wrong)} is neither yes nor no; get the labels again: {self.source}")
        return labels


def _place(answer: Answer) -> tuple[str, str]:
    """Category and label file of an answer, by its `question_id` <category>/.../<picture>."""
    return str(answer.id).split("/")[0], _file(str(answer.id))


def _file(picture: str) -> str:
    """The label file of a picture, which has its name up to the first point."""
    return picture.split("/")[-1].split(".")[0] + ".txt"


def _judged(answer: Answer, labels: Mapping[tuple[str, str, str], str]) -> _Judged:
    """`answer` beside its label, whose question has the sentence that the prompt lacks, some after two blanks. Raises UserError."""
    category, file = _place(answer)
    question = answer.prompt.replace(SHORT_ANSWER.strip(), "").strip() if SHORT_ANSWER.strip() in answer.prompt else answer.prompt
    wordings = [question] if _YES_OR_NO in question else [f"{question} {_YES_OR_NO}", f"{question}  {_YES_OR_NO}"]
    for wording in wordings:
        if (label := labels.get((category, file, wording))) is not None:
            return _Judged(answer, category, file, wording, label)
    raise UserError(f"--answers: there is no label for {answer.prompt[:80]!r} about {some([answer.id])}; write both as in llava_mme.jsonl")


def _release(folder: Path) -> Labels:
    """The labels in the folders of categories: in one with the pictures, or beside them in questions_answers_YN."""
    labels = []
    for category in sorted(path for path in folder.iterdir() if path.is_dir()):
        apart = category / "questions_answers_YN"
        for file in sorted((apart if (category / "images").is_dir() or apart.is_dir() else category).glob("*.txt")):
            for number, cells in table_lines(file):
                if len(cells) != 2:
                    raise UserError(f"{file}: line {number} has {len(cells)} cells; write a question and its label with a tab between them")
                labels.append(((category.name, file.name, cells[0].strip()), cells[1].strip()))
    return labels


def _template(folder: Path) -> Labels:
    """The labels in the tables of picture, question and label that eval_tool brings."""
    labels = []
    for table in sorted(folder.glob("*.txt")):
        for number, cells in table_lines(table):
            if len(cells) < 3:
                raise UserError(f"{table}: line {number} has {len(cells)} cells; write a picture, a question and a label between tabs")
            labels.append(((table.stem, _file(cells[0]), cells[1].strip()), cells[2].strip()))
    return labels


def _plain(answer: Answer) -> str:
    return yes_or_no(answer.text) or "other"


def _by_picture(asked: Labels, right: Mapping[tuple[str, str, str], bool]) -> dict[str, float]:
    """The points of each category from whether each answer is right; a question without one is wrong."""
    pictures: dict[tuple[str, str], list[bool]] = {}
    for key, _ in asked:
        pictures.setdefault(key[:2], []).append(right.get(key, False))
    return {name: _points(pair for (category, _), pair in pictures.items() if category == name) for name in (*PERCEPTION, *COGNITION)}


def _points(pairs: Iterable[Sequence[bool]]) -> float:
    """The points of a category: its accuracy and the share of pictures with both answers right, in percent each."""
    pairs = list(pairs)
    right, both = sum(sum(pair) for pair in pairs), sum(all(pair) for pair in pairs)
    return (right / (2 * len(pairs)) + both / len(pairs)) * 100 if pairs else 0.0


def _sums(points: Mapping[str, float]) -> dict[str, float]:
    perception, cognition = sum(points[name] for name in PERCEPTION), sum(points[name] for name in COGNITION)
    return {"perception": perception, "cognition": cognition} | {f"category.{name}": value for name, value in points.items()}


def _warnings(judged: Sequence[_Judged], missing: Sequence[tuple[str, str, str]], ours: Mapping[str, float]) -> list[str]:
    """Where the official code, which pairs a table's lines by place, says something else, and what."""
    broken = [one.answer.id for one in judged if _BREAKS_A_TABLE.search(one.answer.text)]
    said = f"perception {ours['perception']:.4f} and cognition {ours['cognition']:.4f}"
    theirs = "stops with ValueError" if broken else _official(judged)
    if theirs == said and not missing:
        return []
    names = [f"{category}/{file}" for category, file, _ in missing]
    why = [f"without an answer, and wrong here: {listed(names, 'question')}"] * bool(missing)
    why += [f"a line break or tab in {listed(broken, 'answer')} would break the official tables"] * bool(broken)
    why = why or ["the two answers about a picture are not one after the other, or there are more than two"]
    return [f"{'; '.join(why)}: here {said}; the official code, for which each two lines are a picture: {theirs}"]


def _official(judged: Sequence[_Judged]) -> str:
    """What calculation.py makes of the tables: each two lines are a picture, whatever their names."""
    points = {}
    for name in (*PERCEPTION, *COGNITION):
        right = [one.right for one in judged if one.category == name]
        if len(right) % 2:
            return "stops with AssertionError"
        points[name] = _points(right[at : at + 2] for at in range(0, len(right), 2))
    figures = _sums(points)
    return f"perception {figures['perception']:.4f} and cognition {figures['cognition']:.4f}"
