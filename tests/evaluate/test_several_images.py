"""Questions about several pictures: from a file, through both engines, and in a conversation."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from fastllava.batch import IMAGE_ID
from fastllava.data.asking import Turn, ask, prompt_text
from fastllava.data.templates import TEMPLATES
from fastllava.errors import UserError
from fastllava.evaluate import chat
from fastllava.evaluate.answer import answer_file, answer_questions
from fastllava.evaluate.checkpoint import load_trained
from fastllava.evaluate.conversation import Conversation
from fastllava.evaluate.engines import Prompt, make_engine
from fastllava.evaluate.engines.transformers_engine import TransformersEngine
from fastllava.evaluate.pictures import load_pictures
from fastllava.evaluate.questions import Question, read_questions


@pytest.fixture(scope="module")
def trained(tiny_llava):
    return load_trained(tiny_llava, precision="fp32", device=torch.device("cpu"))


@pytest.fixture
def images(golden: Path) -> Path:
    return golden / "trace" / "images"


@pytest.fixture
def two(images) -> tuple[Path, ...]:
    return images / "img0.png", images / "img1.png"


def embedded(trained, questions):
    prompts = [
        Prompt(ask(trained.form, Turn(one.text, len(one.images)), trained.tokenizer), load_pictures(one, trained)) for one in questions
    ]
    return TransformersEngine(trained).inputs(prompts)


@pytest.mark.parametrize("name", [name for name, form in TEMPLATES.items() if form.style != "plain"])
def test_several_stand_in_their_places_or_before_the_question(name):
    form = TEMPLATES[name]
    assert "Is <image> like <image>?" in prompt_text(form, Turn("Is <image> like <image>?", 2))
    assert "<image>\n<image>\nSame?" in prompt_text(form, Turn("Same?", 2))
    # Of one it stays as the original has it.
    assert "<image>\nIs <image> red?" in prompt_text(form, Turn("Is <image> red?", 1))


def test_a_file_may_list_them(write_lines, images, two):
    rows = [
        {"question_id": 1, "text": "Is <image> like <image>?", "image": ["img0.png", "img1.png"]},
        {"question_id": 2, "text": "Red?", "image": ["img0.png"]},
        {"question_id": 3, "text": "Red?", "image": "img0.png"},
    ]
    found = read_questions(write_lines("q.jsonl", rows), images)
    assert [one.images for one in found] == [two, two[:1], two[:1]]
    assert found[1].image == found[2].image == two[0]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"text": "Is <image> red?", "image": ["a", "b"]},
            "the text has 1 <image> for 2 images; write one for each, where it belongs",
        ),
        ({"text": "<image>" * 3, "image": ["a", "b"]}, "the text has 3 <image> for 2 images"),
        ({"text": "Red?", "image": []}, "image is list; write one path below the folder of images, or a list"),
        ({"text": "Red?", "image": ["a", 3]}, "image is list"),
        ({"text": "Red?", "image": [["a"]]}, "image is list"),
    ],
)
def test_a_list_that_does_not_fit_is_one_line(write_lines, images, row, says):
    with pytest.raises(UserError) as error:
        read_questions(write_lines("q.jsonl", [{"question_id": 1, **row}]), images)
    assert says in str(error.value)
    assert ": line 1" in str(error.value)


def test_each_picture_s_features_lie_in_its_place(trained, two):
    placed, alone = (Question(0, text, image, text) for text, image in (("<image>, <image>", two), ("x", two[1])))
    (row,), _ = embedded(trained, [placed])
    patches = trained.model.spec.patches
    ids = ask(trained.form, Turn(placed.text, 2), trained.tokenizer)
    first, second = (at for at, token in enumerate(ids) if token == IMAGE_ID)
    shown = [trained.model.projector(trained.model.features(torch.from_numpy(pixels)[None])) for pixels in load_pictures(placed, trained)]
    torch.testing.assert_close(row[first : first + patches], shown[0].detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(row[second + patches - 1 :][:patches], shown[1].detach(), rtol=1e-5, atol=1e-5)
    assert not torch.equal(shown[0], shown[1])
    # In a batch with others, as alone.
    many, mask = embedded(trained, [placed, alone])
    torch.testing.assert_close(many[0][mask[0].bool()], row, rtol=1e-5, atol=1e-5)


def test_one_missing_picture_and_too_many_tokens_are_said(trained, two, tmp_path):
    questions = [Question(1, "Same?", (two[0], tmp_path / "none.png"), "Same?"), Question(2, "Same?", two, "Same?")]
    with pytest.raises(UserError, match=r"^question 1: image .*none\.png: is not there; put it there, or write --skip-bad"):
        answer_questions(trained, questions, tmp_path / "a.jsonl", max_new_tokens=2)
    outcome = answer_questions(trained, questions, tmp_path / "b.jsonl", max_new_tokens=2, skip_bad=True)
    assert ([one.question.id for one in outcome.left_out], outcome.answered) == ([1], 1)
    short = replace(trained, max_tokens=60)
    with pytest.raises(UserError, match=r"^question 2: its prompt with 2 pictures has \d+ tokens, and the model reads 60; shorten it"):
        answer_questions(short, questions[1:], tmp_path / "c.jsonl", max_new_tokens=2)


def test_vllm_gets_them_all(trained, two, tiny_llava, images, write_lines, tmp_path, monkeypatch):
    asked, made = [], {}
    module = ModuleType("vllm")
    module.SamplingParams = SimpleNamespace  # pyright: ignore[reportAttributeAccessIssue]

    def generate(prompts, settings, use_tqdm):
        asked.extend(prompts)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=(91, 2), finish_reason="stop")]) for _ in prompts]

    module.LLM = lambda **given: made.update(given) or SimpleNamespace(generate=generate)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    path = write_lines("q.jsonl", [{"question_id": 1, "text": "Same?", "image": [one.name for one in two]}])
    given = {"template": None, "max_new_tokens": 3, "batch_size": 1, "engine": "vllm", "precision": "fp32", "skip_bad": False}
    from rich.console import Console

    answer_file(tiny_llava, path, images, tmp_path / "a.jsonl", **given, console=Console(quiet=True))
    assert made["limit_mm_per_prompt"] == {"image": 2}
    (prompt,) = asked
    shown = [np.asarray(picture).transpose(2, 0, 1) for picture in prompt["multi_modal_data"]["image"]]
    pixels = load_pictures(Question(1, "", two, ""), trained)
    assert all(np.array_equal(one, other) for one, other in zip(shown, pixels, strict=True))
    ids = ask(trained.form, Turn("Same?", 2), trained.tokenizer)
    assert [number for number, token in enumerate(ids) if token == IMAGE_ID] == [
        number for number, token in enumerate(prompt["prompt_token_ids"]) if token != ids[number]
    ]
    engine = make_engine("vllm", trained, 1)
    engine.trained = replace(trained, max_tokens=ids.index(IMAGE_ID) + 20)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match="vllm cannot cut a picture"):
        engine._prompt(Prompt(ids, pixels))  # pyright: ignore[reportAttributeAccessIssue]


def test_a_conversation_takes_one_more(trained, two, tmp_path, monkeypatch):
    conversation = Conversation(trained, TransformersEngine(trained, 1), 8)
    written, remarks = [], []
    lines = f"/image {two[0]}\nRed?\n/add {two[1]}\nSame?\n/prompt\n/add none.png\n/add\nOh?\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    chat.talk(conversation, chat.Terminal(written.append, remarks.append, interactive=False))
    assert remarks[1] == f"picture 2 is {two[1]}, and stands before the next question: {chat.ONE_PICTURE}"
    assert re_counted(remarks[2]) == (2, trained.model.spec.patches)
    assert remarks[3:] == [
        "/add: there is no file 'none.png'; give the path of a picture; the conversation is as it was",
        "/add: names no file; give the path of a picture",
    ]
    answers = [turn.answer for turn in conversation.turns]
    text, ids = conversation.prompt(conversation.turns[:2], "Oh?")
    assert f"USER: <image>\nRed? ASSISTANT: {answers[0]}</s>USER: <image>\nSame? ASSISTANT: {answers[1]}</s>USER: Oh?" in text
    assert ids.count(IMAGE_ID) == len(conversation.pixels) == 2
    # What a forgotten round showed stays, before the first question that is left.
    assert "USER: <image>\n<image>\nSame?" in conversation.prompt(conversation.turns[1:2], "Oh?")[0]
    conversation.reset()
    assert "USER: <image>\n<image>\nNow? ASSISTANT:" in conversation.prompt([], "Now?")[0]
    assert "USER: <image> or <image>? ASSISTANT:" in conversation.prompt([], "<image> or <image>?")[0]
    # The same answer as that of a file.
    conversation.answer("Same?", lambda _: None)
    answer_questions(trained, [Question(0, "Same?", two, "Same?")], tmp_path / "a.jsonl", max_new_tokens=8)
    assert conversation.turns[0].answer == json.loads((tmp_path / "a.jsonl").read_text())["text"]
    conversation.trained = replace(trained, max_tokens=3 * trained.model.spec.patches)
    with pytest.raises(UserError, match=r"^3 pictures take \d+ tokens, and the model takes \d+, some of them for a question"):
        conversation.add(two[0])
    assert len(conversation.pixels) == 2


def re_counted(remark: str) -> tuple[int, int]:
    """How many pictures /prompt counts, and the patches of each."""
    words = remark.split()
    return int(words[2]), int(words[-1])
