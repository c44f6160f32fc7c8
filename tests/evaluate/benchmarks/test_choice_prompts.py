"""What the benchmarks of choices and of yes and no ask, against the recorded runs of the original's evaluation programs."""

import json
from pathlib import Path

import pytest

from fastllava.evaluate.benchmarks import benchmark

FILES = {
    "scienceqa": ("scienceqa.json", "llava_test_CQM-A.json"),
    "pope": ("pope.jsonl", "llava_pope_test.jsonl"),
    "mme": ("mme.jsonl", "llava_mme.jsonl"),
    "mmbench": ("mmbench.tsv", "mmbench_dev_20230712.tsv"),
    "mmbench_cn": ("mmbench_cn.tsv", "mmbench_dev_cn_20231003.tsv"),
    "seed_bench": ("seed_bench.jsonl", "llava-seed-bench.jsonl"),
}


@pytest.mark.parametrize("name", FILES)
def test_questions_equal_the_original(official: Path, tmp_path: Path, name: str) -> None:
    """Text, field of the answers file, picture or none, and limit of each row, as the programs had them for the published scores."""
    source, target = FILES[name]
    (tmp_path / target).symlink_to(official / "prompts" / "questions" / source)
    rows = json.loads((official / "prompts" / "prompts.json").read_text())
    rows = [row for row in rows if row["benchmark"] == name and row["mode"] == "vicuna_v1"]
    one = benchmark(name)
    questions = one.questions(tmp_path)
    assert len(questions) == len(rows) > 0
    for question, row in zip(questions, rows, strict=True):
        image = "<image>\n" if row["image"] else ""
        assert row["prompt"].endswith(f" USER: {image}{question.text} ASSISTANT:")
        assert (question.id, question.prompt, question.image is not None) == (row["question_id"], row["prompt_field"], row["image"])
        assert one.max_new_tokens == row["max_new_tokens"]
        for field in ("options", "option_char"):
            assert question.fields.get(field) == row.get(field)
