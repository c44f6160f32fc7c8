"""The questions of vqav2, gqa, vizwiz and textvqa, in the folders that the original has them in."""

import json
import shutil
from pathlib import Path

import pytest

from fastllava.evaluate.benchmarks import benchmark

PLACES = {
    "vqav2": ("llava_vqav2_mscoco_test-dev2015.jsonl", "test2015"),
    "gqa": ("llava_gqa_testdev_balanced.jsonl", "data/images"),
    "vizwiz": ("llava_test.jsonl", "test"),
    "textvqa": ("llava_textvqa_val_v051_ocr.jsonl", "train_images"),
}


@pytest.mark.parametrize("name", PLACES)
def test_questions_are_what_the_original_asked(official: Path, tmp_path: Path, name: str) -> None:
    """Every recorded prompt holds the text of its question; id, prompt field and limit of new tokens are the recorded ones."""
    file, images = PLACES[name]
    shutil.copyfile(official / "prompts" / "questions" / f"{name}.jsonl", tmp_path / file)
    (tmp_path / images).mkdir(parents=True)
    questions = benchmark(name).questions(tmp_path)
    rows = [row for row in json.loads((official / "prompts" / "prompts.json").read_text(encoding="utf-8")) if row["benchmark"] == name]
    assert {row["row"] for row in rows} == set(range(len(questions)))
    for row in rows:
        question = questions[row["row"]]
        assert (question.id, question.prompt) == (row["question_id"], row["prompt_field"])
        assert question.text in row["prompt"]
        assert question.image is not None
        assert benchmark(name).max_new_tokens == row["max_new_tokens"]
