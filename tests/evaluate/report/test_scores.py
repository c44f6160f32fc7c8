"""The page of scores: the table, the charts of categories, and answers whose pictures are shown or said to be missing."""

import re
from pathlib import Path

import pytest
from PIL import Image

from fastllava.evaluate.report.scores import SHOWN, Example, write_scores_page

POPE = {
    "title": "POPE",
    "headline": "f1_mean",
    "value": 85.94,
    "unit": 100.0,
    "published": {"7b": 85.9, "13b": 85.9},
    "noise": "0.2",
    "figures": {"f1_mean": 0.8594, **{f"{kind}.{name}": 0.8 for kind in ("random", "popular") for name in ("tp", "f1", "accuracy")}},
}
MME = {
    "title": "MME",
    "headline": "perception",
    "value": 1510.7,
    "unit": 1.0,
    "published": {"7b": 1510.7, "13b": 1531.3},
    "warnings": ["3 pairs are not whole"],
    "figures": {"perception": 1510.7, "cognition": 350.0, "category.count": 155.0, "category.OCR": 140.0},
}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (900, 300), "orange").save(tmp_path / "a.jpg")
    return tmp_path / "a.jpg"


def written(tmp_path: Path, scores: dict, examples: list[Example] = []) -> str:  # noqa: B006
    return write_scores_page(tmp_path / "report.html", scores, examples).read_text(encoding="utf-8")


def test_scores_stand_beside_the_published_ones_with_charts_of_categories(tmp_path: Path) -> None:
    page = written(tmp_path, {"checkpoint": "runs/x", "benchmarks": {"pope": POPE, "mme": MME}})
    rows = [re.sub("<[^>]+>", "|", row).split("|") for row in re.findall("<tr>.*?</tr>", page, re.DOTALL)]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert ["POPE", "85.9", "85.9", "85.9", "0.2"] in cells
    assert ["MME", "1,510.7", "1,510.7", "1,531.3", "1 warning"] in cells
    assert re.findall("<figcaption>(.*?)</figcaption>", page) == ["POPE: f1", "MME", "MME: by category"]
    assert re.findall(r">(count|OCR|random|popular)</text>", page) == ["random", "popular", "count", "OCR"]
    assert "MME: 3 pairs are not whole" in page


def test_right_and_wrong_answers_are_shown_with_their_pictures(tmp_path: Path, picture: Path) -> None:
    examples = [Example("pope", f"question {i}?", picture, "yes", "no", float(i % 2)) for i in range(40)]
    page = written(tmp_path, {"benchmarks": {"pope": POPE}}, examples)
    assert page.count('card is-right"') == page.count('card is-wrong"') == SHOWN
    assert page.count("data:image/jpeg;base64,") == 2 * SHOWN
    assert 'width="320" height="107"' in page


@pytest.mark.parametrize(
    ("source", "said"), [(b"GIF8", "the header is broken"), (b"", "is no JPEG"), (Path("/nowhere/at/all.png"), "there is no such file")]
)
def test_a_picture_that_cannot_be_read_is_said_to_be_missing(tmp_path: Path, source: Path | bytes, said: str) -> None:
    page = written(tmp_path, {"benchmarks": {"pope": POPE}}, [Example("pope", "q", source, "a", "", None)])
    assert f"No picture: {said}" in page


@pytest.mark.parametrize(
    "scores", [{}, {"benchmarks": None}, {"benchmarks": {"pope": {}, "mme": 3, "x": {"figures": {"a": "b", "c": None}}}}]
)
def test_what_is_missing_is_left_out(tmp_path: Path, scores: dict) -> None:
    assert "<h2>Scores</h2>" in written(tmp_path, scores)
