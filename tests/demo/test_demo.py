"""The embedded default: what is drawn and asked is right, the answers are scored right, and the whole runs, resumes and learns."""

import itertools
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fastllava.config import load_config
from fastllava.data.tokenizer import Tokenizer
from fastllava.demo.answers import OVERALL, compare, majority_answers, score
from fastllava.demo.backbones import BackboneSizes
from fastllava.demo.dataset import draw_set
from fastllava.demo.questions import CHOICES, KINDS, Question, ask, ask_several
from fastllava.demo.report import Example, pick
from fastllava.demo.run import DemoSettings, demo, stage_configs
from fastllava.demo.scenes import BACKGROUNDS, CANVAS, COLOURS, GRID, PLACES, SHAPES, Scene, draw_scene, is_held_out, paint
from fastllava.demo.tower import CLASSES, patch_labels
from fastllava.errors import UserError
from fastllava.evaluate.answers import read_answers
from fastllava.evaluate.benchmarks import benchmark
from fastllava.evaluate.questions import read_questions
from fastllava.evaluate.score import score_file

TINY = DemoSettings(
    train_pictures=24,
    held_out_pictures=6,
    questions=2,
    sizes=BackboneSizes(tower_width=32, tower_blocks=2, tower_epochs=1, llm_width=32, llm_layers=1, llm_heads=2, llm_texts=32),
)


def quiet() -> Console:
    return Console(file=open(os.devnull, "w"))


def quarters_that_differ(scene: Scene, image: Image.Image) -> dict[int, np.ndarray]:
    """The mean colour of what is not background, by quarter, found in the pixels alone."""
    pixels = np.asarray(image).astype(int)
    side = CANVAS // GRID
    found = {}
    for place in range(len(PLACES)):
        row, column = divmod(place, GRID)
        quarter = pixels[row * side : (row + 1) * side, column * side : (column + 1) * side].reshape(-1, 3)
        apart = np.abs(quarter - pixels[0, 0]).sum(1) > 60
        if apart.mean() > 0.05:
            found[place] = quarter[apart].mean(0)
    return found


def test_the_pixels_hold_what_the_answers_say():
    rng = random.Random(3)
    for _ in range(200):
        scene = draw_scene(rng, held_out=False)
        image = paint(scene, rng)
        found = quarters_that_differ(scene, image)
        assert str(len(found)) == ask("count", scene, rng).answer
        nearest = {min(COLOURS, key=lambda name: np.abs(colour - COLOURS[name]).sum()) for colour in found.values()}
        assert nearest == {ask("colour", scene, rng).answer}
        corner = np.asarray(image)[0, 0].astype(int)
        assert min(BACKGROUNDS, key=lambda name: np.abs(corner - BACKGROUNDS[name]).sum()) == ask("background", scene, rng).answer
        position = ask("position", scene, rng)
        assert (position is None) == (len(found) != 1)
        if position is not None:
            assert PLACES.index(position.answer) == next(iter(found))


def test_shapes_differ_in_their_pixels():
    filled = {}
    for shape in SHAPES:
        image = np.asarray(paint(Scene(shape, "blue", (0,), "white"), random.Random(0))).astype(int)
        filled[shape] = (np.abs(image - 240).sum(-1) > 100).sum()
    assert len(set(filled.values())) == len(SHAPES)


def test_no_question_gives_another_ones_answer_away():
    rng = random.Random(0)
    answers = {*COLOURS, *SHAPES, *BACKGROUNDS, *PLACES, *"1234"}
    with_options = 0
    for _ in range(300):
        asked = ask_several(draw_scene(rng, held_out=False), 5, rng)
        assert len({question.kind for question in asked}) == len(asked)
        for question in asked:
            text, *options = question.text.split("\n")
            assert not answers & set(text.lower().strip("?.").split())
            if options:
                with_options += 1
                # All of them, always in one order: they say nothing about the picture.
                assert tuple(option.split(". ", 1)[1] for option in options[:-1]) == CHOICES[question.kind]
    assert 100 < with_options < 200


def test_the_letter_is_that_of_the_right_option():
    question = Question("position", "Where is it?", "bottom left").with_options()
    assert question.text.split("\n")[1:5] == ["A. top left", "B. top right", "C. bottom left", "D. bottom right"]
    assert question.answer == "C"


def test_held_out_scenes_never_occur_in_training_and_drawing_repeats(tmp_path):
    first = draw_set(tmp_path / "a", 60, 20, 5, seed=4)
    again = draw_set(tmp_path / "b", 60, 20, 5, seed=4)
    assert not set(first.train.values()) & set(first.held_out_scenes.values())
    assert all(is_held_out(scene) for scene in first.held_out_scenes.values())
    assert len(set(first.held_out_scenes.values())) == 20
    assert first.train == again.train
    names = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(names) == 80 + 4
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    assert draw_set(tmp_path / "c", 60, 20, 5, seed=5).train != first.train


def test_a_fifth_of_all_scenes_is_held_out():
    places = [p for n in range(1, 5) for p in itertools.combinations(range(4), n)]
    scenes = [Scene(*parts) for parts in itertools.product(SHAPES, COLOURS, places, BACKGROUNDS)]
    assert len(scenes) == 1080
    assert 0.15 < sum(map(is_held_out, scenes)) / len(scenes) < 0.25


def test_patch_labels_by_hand():
    labels = patch_labels([Scene("star", "green", (1,), "black")], 4)
    assert labels.shape == (1, 16, len(CLASSES))
    top_right = [2, 3, 6, 7]
    assert labels[0, top_right, 0].tolist() == [1 + SHAPES.index("star")] * 4
    assert labels[0, top_right, 1].tolist() == [1 + list(COLOURS).index("green")] * 4
    assert labels[0, :, 0].count_nonzero() == 4
    assert labels[0, :, 2].tolist() == [0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2
    assert set(labels[0, :, 3].tolist()) == {list(BACKGROUNDS).index("black")}


def test_scores_are_shares_of_exact_answers():
    questions = [Question("count", "q", "1"), Question("count", "q", "2"), Question("count", "q", "2"), Question("colour", "q", "red")]
    assert score(questions, ["1", "2", "22", "Red"]) == {"count": 2 / 3, "colour": 0.0, OVERALL: 0.5}
    assert majority_answers(questions) == {"count": "2", "colour": "red"}
    compared = compare(questions, ["", "", "", ""], ["1", "2", "2", "red"])
    assert compared.majority == {"count": 2 / 3, "colour": 1.0, OVERALL: 0.75}
    assert (compared.before[OVERALL], compared.after[OVERALL], compared.questions[OVERALL]) == (0.0, 1.0, 4)


def test_pick_takes_types_in_turn_and_each_picture_once(tmp_path):
    examples = [Example(tmp_path / str(i // 2), Question("ab"[i % 2], "q", "x"), "", "") for i in range(20)]
    picked = pick(examples, 6)
    assert len({example.image for example in picked}) == len(picked) == 6
    assert [example.question.kind for example in picked] == ["a", "b"] * 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, demo(out, TINY, quiet(), ("train.epochs=1",))


def test_a_miniature_demo_leaves_everything(tiny):
    out, result = tiny
    report = json.loads((out / "report.json").read_text())
    assert set(report["after"]) == {*KINDS, OVERALL}
    questions = read_questions(out / "data" / "questions.jsonl", out / "data" / "images")
    for name in ("before", "after"):
        answers = read_answers(out / "answers" / f"{name}.jsonl").whole()
        assert [answer.id for answer in answers] == [question.id for question in questions]
    page = (out / "report.html").read_text()
    assert "Stage 1, pretrain" in page
    assert "Stage 2, finetune" in page
    assert page.count('<figure class="chart"') >= 2 * 8
    assert 'alt="answers.png" src="data:image/png;base64,' in page
    assert (out / "answers.png").read_bytes().startswith(b"\x89PNG")
    assert result.report == out / "report.html"
    for stage in ("pretrain", "finetune"):
        assert json.loads((out / stage / "run_summary.json").read_text())["status"] == "complete"
    assert (result.checkpoint / "model.safetensors").exists()
    tokenizer = Tokenizer.load(out / "llm")
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)


def test_the_config_it_leaves_is_the_one_that_ran(tiny):
    out, _ = tiny
    assert load_config(out / "finetune.yaml") == stage_configs(out, ("train.epochs=1",))[1]


def test_the_same_demo_again_goes_on_and_another_one_is_refused(tiny):
    out, result = tiny
    written = (out / "finetune" / "model.safetensors").stat().st_mtime_ns
    assert demo(out, TINY, quiet(), ("train.epochs=1",)).accuracy == result.accuracy
    assert (out / "finetune" / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="other settings"):
        demo(out, DemoSettings(seed=2), quiet())


def test_adapters_lie_beside_the_demo_without_them(tiny):
    out, result = tiny
    written = (out / "finetune" / "model.safetensors").stat().st_mtime_ns
    adapted = demo(out, TINY, quiet(), ("train.epochs=1",), lora=True)
    assert (out / "finetune" / "model.safetensors").stat().st_mtime_ns == written
    assert adapted.checkpoint == out / "lora" / "finetune" != result.checkpoint
    assert (adapted.checkpoint / "adapter_model.safetensors").exists()
    assert not (adapted.checkpoint / "model.safetensors").exists()
    assert adapted.report == out / "lora" / "report.html"
    assert read_answers(out / "lora" / "answers" / "after.jsonl").whole()
    assert adapted.accuracy.before == result.accuracy.before


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        demo(tmp_path, TINY, quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_its_benchmark_is_one_that_users_score(tiny):
    """Its score is what `fastllava score` says of the answers that it leaves."""
    out, result = tiny
    held = json.loads((out / "eval" / "scores.json").read_text())["benchmarks"]["scienceqa"]
    found = score_file(benchmark("scienceqa"), out / "benchmarks" / "scienceqa", out / "eval" / "answers" / "scienceqa.jsonl")
    assert held["figures"] == dict(found.figures)
    assert found.figures["img_count"] == found.figures["count"] == TINY.held_out_pictures
    assert result.with_options == found.figures["img_accuracy"] / 100


@pytest.mark.exhaustive
def test_the_demo_learns_to_answer(tmp_path: Path):
    result = demo(tmp_path / "out", console=quiet())
    assert result.accuracy.majority[OVERALL] <= 0.40
    assert result.accuracy.before[OVERALL] <= 0.40
    assert result.accuracy.after[OVERALL] >= 0.90
    assert result.with_options >= 0.85
