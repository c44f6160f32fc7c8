"""Formats in which results of benchmarks are published, beside answers files: each is read into Answers."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from fastllava.errors import UserError
from fastllava.evaluate.answers import Answer, Answers, read_answers

_LARGEST_SHEET = 2**30
"""Bytes that a spreadsheet may hold when it is unpacked. MMBench's upload sheets have under one million."""


def predictions(path: Path) -> Answers:
    """An answers file, or the lines `{"question_id", "prediction"}` that SEED-Bench's leaderboard takes."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = json.loads(next((line for line in file if line.strip()), ""))
    except (OSError, ValueError, RecursionError):
        return read_answers(path)
    if not isinstance(first, dict) or "text" in first or "prediction" not in first:
        return read_answers(path)
    rows: list[Answer] = []
    broken: list[int] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        row = _object(line)
        if isinstance(row.get("prediction"), str) and isinstance(row.get("question_id"), int | str):
            rows.append(Answer(len(rows) + len(broken), row["question_id"], "", row["prediction"], row))
        else:
            broken.append(number)
    return Answers(path, rows, broken)


def science_results(path: Path) -> Answers:
    """An answers file, or the `_output` or `_result` file that the original's eval_science_qa.py makes of one.

    An `_output` keeps each text, prompt and label; the rows that it made of missing answers are left out. A `_result` keeps texts alone.
    """
    try:
        found = _object(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError):
        return read_answers(path)
    if isinstance(found.get("correct"), list) and isinstance(found.get("incorrect"), list):
        rows = [row for row in found["correct"] + found["incorrect"] if not _was_missing(row)]
        if broken := [number for number, row in enumerate(rows, 1) if not _texts(row, "question", "pred", "ground_truth")]:
            raise UserError(f"--answers: result {broken[0]} of {path} has no question, pred or ground_truth; give the answers file itself")
        return Answers(path, [Answer(at, row["question_id"], row["question"], row["pred"], row) for at, row in enumerate(rows)], [])
    if isinstance(found.get("outputs"), dict) and isinstance(found.get("results"), dict):
        texts = found["outputs"]
        return Answers(path, [Answer(at, name, "", str(text), {}) for at, (name, text) in enumerate(texts.items())], [])
    return read_answers(path)


def sheet(path: Path) -> Answers:
    """An answers file, or the .xlsx of `index`, `prediction` and further columns that MMBench's server takes.

    A cell without a prediction is an empty answer. The fields of an answer are the cells of its row.
    """
    if path.suffix.lower() != ".xlsx":
        return read_answers(path)
    rows = _sheet_rows(path)
    header = [str(cell) for cell in next(rows, ())]
    if lacking := [name for name in ("index", "prediction") if name not in header]:
        raise UserError(f"--answers: {path} has no column {' and no column '.join(lacking)}; give a sheet as uploaded to the server")
    answers = []
    for at, cells in enumerate(rows):
        row = dict(zip(header, cells, strict=False))
        if row.get("index") is not None:
            said = row.get("prediction")
            answers.append(Answer(at, _plain(row["index"]), str(row.get("question")), "" if said is None else str(_plain(said)), row))
    if not answers:
        raise UserError(f"--answers: {path} holds no prediction; give a sheet as uploaded to the server")
    return Answers(path, answers, [])


def result_tables(path: Path) -> Answers:
    """An answers file, or a folder of MME's tables `<category>.txt`: image, question, label and answer between tabs."""
    if not path.is_dir():
        return read_answers(path)
    answers: list[Answer] = []
    for table in sorted(path.glob("*.txt")):
        for number, cells in table_lines(table):
            if len(cells) != 4:
                raise UserError(
                    f"--answers: line {number} of {table} has {len(cells)} cells; write image, question, label and answer between tabs"
                )
            name, question, label, text = cells
            answers.append(Answer(len(answers), f"{table.stem}/{name}", question, text, {"label": label}))
    if not answers:
        raise UserError(f"--answers: {path} holds no table <category>.txt; give the folder of the 14 tables, or an answers file")
    return Answers(path, answers, [])


def table_lines(path: Path) -> list[tuple[int, list[str]]]:
    """The lines of a table between tabs with their numbers from 1, without empty ones. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise UserError(f"{path} cannot be read ({reason}); get it again from where it came") from None
    return [(number, line.rstrip("\r").split("\t")) for number, line in enumerate(lines, 1) if line.strip()]


def _object(text: str) -> dict[str, Any]:
    """The JSON object in `text`; an empty one when it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _texts(row: Any, *names: str) -> bool:
    return isinstance(row, dict) and isinstance(row.get("question_id"), int | str) and all(isinstance(row.get(name), str) for name in names)


def _was_missing(row: Any) -> bool:
    """Whether eval_science_qa.py wrote `row` in the place of an answer that was not there."""
    return isinstance(row, dict) and (row.get("question"), row.get("pred")) == ("Unknown", "FAILED")


def _plain(cell: Any) -> int | str:
    """A cell as its text says it: whole numbers without a point."""
    return int(cell) if isinstance(cell, float) and cell.is_integer() else cell if isinstance(cell, int) else str(cell)


def _sheet_rows(path: Path) -> Any:
    """The rows of the first sheet, as tuples of cells. Raises UserError for a file that is no spreadsheet or would fill the memory."""
    from openpyxl import load_workbook

    try:
        with ZipFile(path) as packed:
            size = sum(part.file_size for part in packed.infolist())
        rows: Iterable = () if size > _LARGEST_SHEET else list(load_workbook(path, read_only=True, data_only=True).worksheets[0].values)
    except Exception as error:  # a damaged spreadsheet makes openpyxl raise nearly anything
        raise UserError(
            f"--answers: {path} cannot be read as a spreadsheet ({type(error).__name__}: {error}); save it anew as .xlsx"
        ) from None
    if size > _LARGEST_SHEET:
        raise UserError(f"--answers: {path} unpacks to {size / 2**30:.1f} GiB; give the sheet of predictions alone")
    return iter(rows)
