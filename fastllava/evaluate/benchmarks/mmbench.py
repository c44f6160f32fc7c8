"""MMBench: questions with up to four choices, each asked in every rotation of them (llava/eval/model_vqa_mmbench.py)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fastllava.errors import UserError
from fastllava.evaluate.answers import Answer, Answers
from fastllava.evaluate.benchmark import OPTION_LETTER, Benchmark, Score, ServerScored
from fastllava.evaluate.matching import key, listed, some
from fastllava.evaluate.questions import Question
from fastllava.evaluate.readings import option, otherwise
from fastllava.evaluate.shipped import sheet
from fastllava.evaluate.tables import Row, Table, read_table

LETTERS = "ABCD"
_ROTATION = 1_000_000
"""The rotations of question i have the index i, i + 1,000,000, i + 2,000,000, ..."""
_NOT_UPLOADED = frozenset(("hint", "category", "source", "image", "comment", "l2-category"))
_PREDICTION_AT = 6


@dataclass(frozen=True)
class _Asked:
    """A row: a question in one rotation of its choices."""

    index: int
    answer: str | None
    category: str
    lost: str
    """Letters of choices that are in the table and, for want of an unbroken row of them, not in the prompt."""

    @property
    def question(self) -> int:
        return self.index % _ROTATION


class MMBench(Benchmark):
    """The English dev split: 1,176 questions in 4,377 rows."""

    name = "mmbench"
    title = "MMBench (dev)"
    folder = "mmbench"
    max_new_tokens = 1024
    headline = "circular_accuracy"
    published: ClassVar[Mapping[str, float]] = {"7b": 64.3, "13b": 67.7}
    unit = 100.0
    file: ClassVar[str] = "mmbench_dev_20230712.tsv"
    sentence: ClassVar[str] = OPTION_LETTER
    source = (
        "download mmbench_dev_20230712.tsv from https://download.openmmlab.com/mmclassification/datasets/mmbench/mmbench_dev_20230712.tsv"
    )

    def questions(self, data: Path) -> list[Question]:
        """A question for each row of the table. Its choices end at the first cell that pandas or the original takes for missing."""
        table = self._table(data, "index", "question", "hint", *LETTERS, "image")
        return [self._question(table, row) for row in table.rows]

    def _question(self, table: Table, row: Row) -> Question:
        text = row.text("question")
        if text is None:
            raise UserError(f"{table.path}: {row.name} has no question; get the file again: {self.source}")
        hint, choices = _kept(row, "hint"), _choices(row)
        prompt = "\n".join([*([] if hint is None else [hint]), text, *(f"{a}. {b}" for a, b in zip(LETTERS, choices, strict=False))])
        fields = {"round_id": 0, "options": choices, "option_char": list(LETTERS[: len(choices)])}
        return Question(self._index(table, row), prompt + self.sentence, row.image, prompt, fields)

    def read(self, path: Path) -> Answers:
        """An answers file, or the .xlsx that is uploaded to the server."""
        return sheet(path)

    def score(self, data: Path, answers: Answers) -> Score:
        """The share of questions with every rotation right, and of rows without rotation that are right. A letter is right or not."""
        rows = answers.whole()
        asked = self._asked(data, rows)
        said = {key(answer.id): answer for answer in rows if not _rotated(answer)}
        right = {one.index: (found := said.get(one.index)) is not None and found.text == one.answer for one in asked}
        figures, circular = _figures(asked, right)
        groups: dict[int, list[_Asked]] = {}
        for one in asked:
            groups.setdefault(one.question, []).append(one)
        questions = []
        for name, ones in groups.items():
            shown = next((one for one in ones if not right[one.index]), ones[0])
            line = said[shown.index].line if shown.index in said else None
            row = {"question_id": name, "line": line, "score": float(circular[name]), "category": ones[0].category}
            questions.append({**row, "rows": {str(one.index): int(right[one.index]) for one in ones}})
        return Score(figures, questions, _warnings(asked, rows, said, right))

    def upload(self, data: Path, answers: Answers, out: Path) -> list[Path]:
        """The .xlsx for the server: the table without pictures, hints and categories, and the predictions beside the choices."""
        from openpyxl import Workbook
        from openpyxl.utils.exceptions import IllegalCharacterError

        table = self._table(data, "index")
        said = {key(answer.id): answer.text for answer in answers.whole() if not _rotated(answer)}
        columns = {name: table.column(name) for name in table.columns if name not in _NOT_UPLOADED}
        names = list(columns)
        names.insert(_PREDICTION_AT, "prediction")
        columns["prediction"] = [said.get(self._index(table, row)) for row in table.rows]
        book = Workbook()
        page = book.worksheets[0]
        page.append(names)
        for at, row in enumerate(table.rows):
            for place, name in enumerate(names, 1):
                try:
                    cell = page.cell(at + 2, place, columns[name][at])
                except IllegalCharacterError:
                    raise UserError(
                        f"{self.name}: {name} of {row.name} of {table.path} has a control character, which a spreadsheet cannot hold; "
                        "take it out of the answers"
                    ) from None
                if isinstance(columns[name][at], str):
                    cell.data_type = "s"  # a text that begins with = is no formula
        out.mkdir(parents=True, exist_ok=True)
        book.save(out / f"{self.name}.xlsx")
        return [out / f"{self.name}.xlsx"]

    def path(self, data: Path) -> Path:
        """Where the table is. Raises Missing."""
        return self.need(data / self.file)

    def _table(self, data: Path, *columns: str) -> Table:
        """The table, with these columns. Raises Missing, and UserError when it lacks one."""
        table = read_table(self.path(data))
        if lacking := [name for name in columns if name not in table.columns]:
            raise UserError(f"{table.path} has no column {some(lacking)}; get the file again: {self.source}")
        if not table.rows:
            raise UserError(f"{table.path} holds no question; get the file again: {self.source}")
        return table

    def _index(self, table: Table, row: Row) -> int:
        index = key(row.cells["index"].strip())
        if not isinstance(index, int):
            raise UserError(f"{table.path}: the index of {row.name} is {index[:60]!r}; write an integer")
        return index

    def _asked(self, data: Path, rows: Sequence[Answer]) -> list[_Asked]:
        """The rows with their labels: those of the table, or without it those that an uploaded sheet holds itself."""
        if not (data / self.file).exists() and all("index" in answer.fields and "answer" in answer.fields for answer in rows):
            truth = {answer.id: answer.fields["answer"] for answer in rows if isinstance(answer.id, int)}
            return [_Asked(index, None if letter is None else str(letter), "", "") for index, letter in truth.items()]
        table = self._table(data, "index")
        if "answer" not in table.columns:
            raise ServerScored(f"{self.name}: {table.path} has no column answer; the server that takes {self.name}.xlsx scores it")
        return [_Asked(self._index(table, row), row.text("answer"), row.text("category") or "", _lost(row)) for row in table.rows]


def _kept(row: Row, column: str) -> str | None:
    """A cell as the original's is_none has it: None and nan are missing in any case."""
    text = row.text(column)
    return None if text is None or text.lower() in ("nan", "none") else text


def _choices(row: Row) -> list[str]:
    """The choices up to the first missing one."""
    found = []
    for letter in LETTERS:
        if (text := _kept(row, letter)) is None:
            break
        found.append(text)
    return found


def _lost(row: Row) -> str:
    return "".join(letter for letter in LETTERS[len(_choices(row)) :] if row.cells.get(letter, "").strip())


def _rotated(answer: Answer) -> bool:
    """Whether it answers a further round of --all-rounds, whose letters are of choices in another order."""
    return str(answer.fields.get("round_id", 0)) != "0"


def _figures(asked: Sequence[_Asked], right: Mapping[int, bool]) -> tuple[dict[str, float], dict[int, bool]]:
    """Both figures, and of each question whether every rotation is right."""
    circular: dict[int, bool] = {}
    for one in asked:
        circular[one.question] = circular.get(one.question, True) and right[one.index]
    single = [right[one.index] for one in asked if one.index < _ROTATION]
    figures = {"circular_accuracy": sum(circular.values()) / len(circular)}
    return (figures | {"single_pass_accuracy": sum(single) / len(single)} if single else figures), circular


def _warnings(asked: Sequence[_Asked], rows: Sequence[Answer], said: Mapping[int | str, Answer], right: Mapping[int, bool]) -> list[str]:
    """Where the official code says something else, and where it asks something else than the table."""
    warnings = []
    figures = _figures(asked, right)[0]
    ours = figures["circular_accuracy"]
    if all("text" in answer.fields for answer in rows):
        as_given = {answer.id: answer.text for answer in rows}
        theirs = _figures(asked, {one.index: as_given.get(one.index) == one.answer for one in asked})[0]
        if theirs != figures:
            turned, texts = sum(map(_rotated, rows)), sum(isinstance(answer.id, str) for answer in rows)
            warnings.append(
                f"answers to further rounds, the last of which the official code takes: {turned:,}; ids that are text, found nowhere: "
                f"{texts:,}. Here circular_accuracy is {ours:.4f}, the official code's sheet gives {theirs['circular_accuracy']:.4f}"
            )
    if odd := [(name, text) for name, answer in said.items() if option(text := answer.text) not in (None, text)]:
        plain = {one.index: one.index in said and (option(text := said[one.index].text) or text) == one.answer for one in asked}
        warnings.append(otherwise(odd, "circular_accuracy", ours, _figures(asked, plain)[0]["circular_accuracy"]))
    if lost := [one for one in asked if one.lost]:
        concerned = {one.question for one in lost}
        rest = [one for one in asked if one.question not in concerned]
        without = f"{_figures(rest, right)[0]['circular_accuracy']:.4f}" if rest else "nothing"
        hopeless = sum(one.answer is not None and one.answer in one.lost for one in lost)
        warnings.append(
            f"choices are lost in {listed([f'{one.index}: {one.lost}' for one in lost], 'row')}, as a cell of None, NA, nan or "
            f"the like is missing for the official code, and for the prompts here; the right one is lost in {hopeless:,}. "
            f"circular_accuracy is {ours:.4f}, and {without} without the {len(concerned):,} concerned"
        )
    if missing := [one.index for one in asked if one.index not in said]:
        warnings.append(f"without an answer: {listed(missing, 'row')}; each is wrong, as in the official sheet, where it stays empty")
    known = {one.index for one in asked}
    if strangers := [answer.id for name, answer in said.items() if name not in known]:
        warnings.append(f"{listed(strangers, 'answer')} to no row of the table, counted nowhere")
    return warnings
