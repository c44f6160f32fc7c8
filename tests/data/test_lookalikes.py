"""A missing image is said with the path that was looked for and what lies there under nearly that name."""

from pathlib import Path

import pytest

from fastllava.data.lookalikes import missing

NAMES = {"a.jpg": "'A.JPG'", "b.png": "'b.jpeg'", "c": "'c.gif'", "d.webp ": "'d.webp'", "train/x.jpg": "'Train'", "e.jpg": None}


@pytest.mark.parametrize("name", NAMES)
def test_the_path_and_what_is_like_it(name: str, tmp_path: Path) -> None:
    for there in ("A.JPG", "b.jpeg", "c.gif", "d.webp", "Train/x.jpg"):
        (tmp_path / there).parent.mkdir(exist_ok=True)
        (tmp_path / there).touch()
    said = missing(tmp_path / name)
    assert said.startswith(f"there is no such file: {tmp_path / name}")
    assert said.endswith("; put it there, or mend data.images or the record")
    like = NAMES[name]
    assert (f"but {like} lies there" in said) if like else ("lies there" not in said)


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    assert f"(no folder coco in {tmp_path})" in missing(tmp_path / "coco" / "train2017" / "1.jpg")
