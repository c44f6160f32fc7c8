"""Prompts are the original's, word for word: with recordings of it, and with a tokenizer and questions of our own."""

import json

import pytest

from fastllava.batch import IMAGE_ID
from fastllava.data.asking import Turn, ask, prompt_text
from fastllava.data.templates import TEMPLATES, template
from fastllava.data.tokenizer import Tokenizer

IN_THE_PROMPT_ALONE = {
    "mmbench": "\nAnswer with the option's letter from the given choices directly.",
    "mmbench_cn": "\n请直接回答选项字母。",
}


def question_of(row):
    """What a recorded row asks: its `prompt_field` has the image's line for ScienceQA, and lacks the last sentence for MMBench."""
    return row["prompt_field"].removeprefix("<image>\n") + IN_THE_PROMPT_ALONE.get(row["benchmark"], "")


@pytest.fixture(scope="module")
def recorded(repo):
    path = repo.parent / "shared" / "golden" / "eval" / "prompts" / "prompts.json"
    if not path.is_file():
        pytest.skip(f"no recordings of the original's prompts at {path}")
    return json.loads(path.read_text(encoding="utf-8")), repo.parent / "shared" / "tokenizer" / "tokenizer.model"


def test_all_recorded_prompts(recorded):
    rows, file = recorded
    newer, older = Tokenizer.load(file, legacy=False), Tokenizer.load(file, legacy=True)
    assert len(rows) == 307
    assert sum("input_ids_legacy" in row for row in rows) == 10
    for row in rows:
        form, turn = template(row["mode"]), Turn(question_of(row), int(row["image"]))
        where = (row["benchmark"], row["mode"], row["row"])
        assert prompt_text(form, turn) == row["prompt"], where
        assert ask(form, turn, newer) == row["input_ids"], where
        assert ask(form, turn, older) == row.get("input_ids_legacy", row["input_ids"]), where


def test_the_prompts_of_the_recorded_answers(golden):
    tokenizer = Tokenizer.load(golden / "tokenizer" / "tokenizer.model", legacy=False)
    for row in json.loads((golden / "generation" / "expected.json").read_text(encoding="utf-8"))["rows"]:
        text = row["question"]
        if row["loop"] == "model_vqa_science":
            text = text.replace("<image>", "").strip() + IN_THE_PROMPT_ALONE["mmbench"]
        turn = Turn(text, int(row["has_image"]))
        assert prompt_text(template(row["mode"]), turn) == row["prompt"]
        assert ask(template(row["mode"]), turn, tokenizer) == row["input_ids"]


ROUNDS = [Turn("Hm?", 1, "A cup."), Turn(" Blue or red ")]
"""A question about a picture, answered, and one with blanks at its ends."""
WRITTEN = {
    "plain": "<image>\nHm?\nA cup.\n Blue or red \n",
    "v1": "{system} USER: <image>\nHm? ASSISTANT: A cup.</s>USER:  Blue or red  ASSISTANT:",
    "v1_mmtag": "{system} USER: <image>\nHm? ASSISTANT: A cup.</s>USER:  Blue or red  ASSISTANT:",
    "llava_v0": "{system}###Human: <image>\nHm?###Assistant: A cup.###Human:  Blue or red ###Assistant:",
    "llava_llama_2": "[INST] <<SYS>>\n{system}\n<</SYS>>\n\n<image>\nHm? [/INST] A cup. </s><s>[INST]  Blue or red  [/INST]",
    "mistral_instruct": "[INST] <image>\nHm? [/INST] A cup. </s>[INST]  Blue or red  [/INST]",
    "mpt": "<|im_start|>system\n{system}<|im_end|><|im_start|>user\n<image>\nHm?<|im_end|><|im_start|>assistant\nA cup.<|im_end|>"
    "<|im_start|>user\n Blue or red <|im_end|><|im_start|>assistant\n",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_conversation_goes_on(name):
    form = template(name)
    assert prompt_text(form, ROUNDS) == WRITTEN[name].replace("{system}", form.system)


@pytest.mark.parametrize("name", ["v0", "default"])
def test_the_first_templates_show_an_example_before_they_ask(name):
    form = template(name)
    text = prompt_text(form, Turn("Hm?", 1))
    assert text.startswith(f"{form.system}###Human: What are the key differences between renewable and non-renewable energy sources?###")
    assert text.endswith("social instability.\n###Human: <image>\nHm?###Assistant:")
    assert len(text) == 1677
    assert [name for name, form in TEMPLATES.items() if form.example] == ["default", "v0"]


def test_a_question_without_a_character_has_no_blank_either():
    assert prompt_text(template("v1"), Turn("")).endswith("questions. USER:ASSISTANT:")
    assert prompt_text(template("v1"), Turn("", 1)).endswith("questions. USER: <image>\n ASSISTANT:")
    assert prompt_text(template("llava_v0"), Turn("")).endswith("questions.###Human:Assistant:")


def test_a_control_token_that_a_question_spells_becomes_one_and_an_image_does_not(golden):
    tokenizer = Tokenizer.load(golden / "tokenizer" / "tokenizer.model", legacy=False)
    plain = ask(template("plain"), Turn("a</s>b<image>", 1), tokenizer)
    assert plain.count(2) == 1
    assert plain.count(IMAGE_ID) == 1
    assert plain.index(IMAGE_ID) < plain.index(2)
    # With legacy pieces the text after it begins with a blank, as a text does.
    older = Tokenizer.load(golden / "tokenizer" / "tokenizer.model", legacy=True)
    assert len(ask(template("plain"), Turn("a</s>b<image>", 1), older)) != plain


def test_the_recorded_variants(recorded, repo):
    """ScienceQA without the sentence about letters."""
    path = repo.parent / "shared" / "golden" / "eval" / "prompts" / "variants.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["scienceqa_without_single_pred_prompt"]
    for row in rows:
        turn = Turn(row["prompt_field"].removeprefix("<image>\n"), int("<image>" in row["prompt"]))
        assert prompt_text(template("llava_v1"), turn) == row["prompt"]
    assert len(rows) > 3
