"""`fastllava answer`: the original's answers at any batch size and in any order, whole after every kill, one line for every mistake."""

import json
import random

import pytest

from fastllava.evaluate.checkpoint import load_trained
from fastllava.evaluate.engines import Prompt
from fastllava.evaluate.engines.transformers_engine import TransformersEngine
from fastllava.evaluate.pictures import load_picture
from fastllava.evaluate.questions import Question

TOKENS = 24
OPTION = "\nAnswer with the option's letter from the given choices directly."


@pytest.fixture(scope="module")
def trained(tiny_llava):
    return load_trained(tiny_llava, precision="fp32")


@pytest.fixture(scope="module")
def recorded(golden):
    """The ten recorded rows of the original's own programs: question, template, ids, text."""
    rows = json.loads((golden / "generation" / "expected.json").read_text(encoding="utf-8"))["rows"]
    for row in rows:
        if row["loop"] == "model_vqa_science":
            row["question"] = row["question"].replace("<image>", "").strip() + OPTION
    return rows


def question_of(row, golden):
    image = golden / "trace" / "images" / row["image"] if row["has_image"] else None
    return Question(row["question_id"], row["question"], image, row["question"])


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_originals_ids(trained, recorded, golden, batch_size):
    """Prompts of several templates, with and without a picture, lie in one batch."""
    order = random.Random(batch_size).sample(range(len(recorded)), len(recorded))
    rows = [recorded[i] for i in order]
    prompts = [Prompt(row["input_ids"], load_picture(question_of(row, golden), trained)) for row in rows]
    found = dict(TransformersEngine(trained, batch_size).generate(prompts, TOKENS))
    assert [found[i] for i in range(len(rows))] == [row["generated_ids"] for row in rows]
