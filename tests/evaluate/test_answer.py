"""`fastllava answer`: the original's answers at any batch size and in any order, whole after every kill, one line for every mistake."""

import base64
import csv
import json
import os
import random
import shutil
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastllava.data.asking import Turn, ask
from fastllava.errors import UserError
from fastllava.evaluate import answer as module
from fastllava.evaluate.answer import answer_file, answer_questions, skipped_file
from fastllava.evaluate.answers import read_answers
from fastllava.evaluate.checkpoint import load_trained
from fastllava.evaluate.engines import Prompt, make_engine, rows_of
from fastllava.evaluate.engines.transformers_engine import TransformersEngine
from fastllava.evaluate.pictures import load_pictures
from fastllava.evaluate.questions import Question

OPTION = "\nAnswer with the option's letter from the given choices directly."
CHINESE = "\n请直接回答选项字母。"


@pytest.fixture(scope="module")
def trained(tiny_llava):
    return load_trained(tiny_llava, precision="fp32")


@pytest.fixture(scope="module")
def recorded(golden):
    """The ten recorded rows of the original's own programs, as questions."""
    rows = json.loads((golden / "generation" / "expected.json").read_text(encoding="utf-8"))["rows"]
    for row in rows:
        text = row["question"]
        if row["loop"] == "model_vqa_science":
            text = text.replace("<image>", "").strip() + OPTION
        image = golden / "trace" / "images" / row["image"] if row["has_image"] else None
        row["asked"] = Question(row["question_id"], text, image, row["question"])
    return rows


@pytest.fixture(scope="module")
def questions(golden):
    """Thirty questions about six pictures and none."""
    images = sorted((golden / "trace" / "images").iterdir())[:6]
    words = ["colour", "lamp", "goat", "violin", "harbour"]
    return [
        Question(
            number, f"What {words[number % 5]} is it? " + "Look. " * (number * 7 % 11), None if number % 6 == 5 else images[number % 6], "q"
        )
        for number in range(30)
    ]


def prompts_of(rows, trained):
    return [Prompt(row["input_ids"], load_pictures(row["asked"], trained)) for row in rows]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_originals_ids(trained, recorded, batch_size):
    """Prompts of several templates, with and without a picture, lie in one batch."""
    rows = random.Random(batch_size).sample(recorded, len(recorded))
    found = dict(TransformersEngine(trained, batch_size).generate(prompts_of(rows, trained), 24))
    assert [found[i] for i in range(len(rows))] == [row["generated_ids"] for row in rows]


@pytest.mark.parametrize("mode", ["vicuna_v1", "llava_llama_2", "llava_v0"])
def test_the_originals_answers_file(trained, recorded, tmp_path, mode):
    rows = [row for row in recorded if row["mode"] == mode]
    outcome = answer_questions(trained.with_template(mode), [row["asked"] for row in rows], tmp_path / "a.jsonl", max_new_tokens=24)
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["text"] for line in lines] == [row["text"] for row in rows]
    assert [line["prompt"] for line in lines] == [row["question"] for row in rows]
    assert {*lines[0]} == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert {line["model_id"] for line in lines} == {"llava"}
    assert outcome.answered == len(rows)
    assert outcome.unended == sum(not row["stopped"] for row in rows)
    assert len(read_answers(tmp_path / "a.jsonl").whole()) == len(rows)


def official_image(official, row):
    """The picture of a row of the larger recordings: in the question files, and for MMBench inside its table."""
    files, name = official / "prompts" / "questions", row["benchmark"]
    if not row["has_image"]:
        return None
    if name.startswith("mmbench"):
        csv.field_size_limit(2**30)
        with (files / f"{name}.tsv").open(encoding="utf-8", newline="") as file:
            return base64.b64decode(list(csv.DictReader(file, delimiter="\t"))[row["row"]]["image"])
    text = (files / ("scienceqa.json" if name == "scienceqa" else f"{name}.jsonl")).read_text(encoding="utf-8")
    rows = json.loads(text) if name == "scienceqa" else [json.loads(line) for line in text.splitlines()]
    return official / "generation" / "images" / rows[row["row"]]["image"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize(("name", "count"), [("expected.json", 28), ("expected_trace_stage2.json", 14)])
def test_all_recorded_ids(official, tmp_path, name, count, batch_size):
    larger = official.parent
    shutil.copytree(official / "generation" / "tiny-llava" if count == 28 else larger / "trace" / "stage2", tmp_path / "llava")
    shutil.copytree(official / "generation" / "tiny-llava" / "clip" if count == 28 else larger / "trace" / "clip", tmp_path / "clip")
    shutil.copyfile(larger.parent / "tokenizer" / "tokenizer.model", tmp_path / "llava" / "tokenizer.model")
    shutil.copyfile(larger / "trace" / "llm" / "tokenizer_config.json", tmp_path / "llava" / "tokenizer_config.json")
    trained = load_trained(tmp_path / "llava", precision="fp32")
    rows = json.loads((official / "generation" / name).read_text(encoding="utf-8"))["rows"]
    assert len(rows) == count
    random.Random(batch_size).shuffle(rows)
    pictures = [load_pictures(Question(0, "", official_image(official, row), ""), trained) for row in rows]
    prompts = [Prompt(row["input_ids"], picture) for row, picture in zip(rows, pictures, strict=True)]
    found = dict(TransformersEngine(trained, batch_size).generate(prompts, 32))
    assert [found[i] for i in range(count)] == [row["generated_ids"] for row in rows]
    assert [trained.tokenizer.decode(found[i]).strip() for i in range(count)] == [row["text"] for row in rows]


def test_a_batch_sees_each_picture_once(trained, questions, monkeypatch, tmp_path):
    seen = []
    features = type(trained.model).features
    monkeypatch.setattr(type(trained.model), "features", lambda model, pixels: seen.append(len(pixels)) or features(model, pixels))
    answer_questions(trained, questions[:12], tmp_path / "a.jsonl", engine=TransformersEngine(trained, 12), max_new_tokens=2)
    assert seen == [5]


def test_what_is_too_long_is_cut_after_the_splice_and_text_alone_is_not(trained, questions):
    shown, text = questions[0], questions[5]
    patches = trained.model.spec.patches
    ids = ask(trained.form, Turn(shown.text, 1), trained.tokenizer)
    short = replace(trained, max_tokens=len(ids) + patches - 1 - 4)
    pixels = load_pictures(shown, trained)
    cut, whole = TransformersEngine(short), TransformersEngine(trained)
    assert rows_of(Prompt(ids, pixels), short) == short.max_tokens
    embeds, mask = cut.inputs([Prompt(ids, pixels)])
    assert torch.equal(embeds, whole.inputs([Prompt(ids[:-4], pixels)])[0])
    assert mask.all()
    # In the middle of the picture too.
    tiny = replace(trained, max_tokens=ids.index(-200) + 3)
    assert torch.equal(TransformersEngine(tiny).inputs([Prompt(ids, pixels)])[0], embeds[:, : tiny.max_tokens])
    alone = Prompt(ask(trained.form, Turn(text.text), trained.tokenizer))
    assert rows_of(alone, replace(trained, max_tokens=10)) == len(alone.ids)


def test_a_full_gpu_halves_the_batch(trained, questions, monkeypatch, tmp_path):
    answer_questions(trained, questions, tmp_path / "a.jsonl", max_new_tokens=4)
    sizes, said = [], []
    answers = TransformersEngine._answers

    def short_of_memory(engine, prompts, limit):
        sizes.append(len(prompts))
        if len(prompts) > 3:
            raise torch.OutOfMemoryError
        return answers(engine, prompts, limit)

    monkeypatch.setattr(TransformersEngine, "_answers", short_of_memory)
    engine = TransformersEngine(trained, 8, said.append)
    answer_questions(trained, questions, tmp_path / "b.jsonl", engine=engine, max_new_tokens=4)
    assert sizes[:3] == [8, 4, 2]
    assert max(sizes[2:]) == 2
    assert said == [f"the GPU's memory is full: going on with batches of {size}" for size in (4, 2)]
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()
    monkeypatch.setattr(TransformersEngine, "_answers", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(UserError, match=r"^--batch-size: one question by itself does not fit"):
        dict(engine.generate([Prompt([1, 5])], 4))


def in_a_child(action):
    """The pid of a forked process that runs `action` and ends."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    return pid


def test_ten_kills_leave_the_same_bytes(trained, questions, tmp_path):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    answer_questions(trained, questions, whole, engine=TransformersEngine(trained, 1), max_new_tokens=8)
    draw, seen = random.Random(3), []
    for _ in range(10):
        wanted = (seen[-1] if seen else 0) + draw.randrange(1, 4)
        pid = in_a_child(lambda: answer_questions(trained, questions, out, engine=TransformersEngine(trained, 1), max_new_tokens=8))
        deadline = time.monotonic() + 60
        while (out.read_bytes().count(b"\n") if out.exists() else 0) < wanted and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        text = out.read_bytes()
        assert whole.read_bytes().startswith(text[: text.rfind(b"\n") + 1])
        seen.append(text.count(b"\n"))
        # What a kill in the middle of a write leaves.
        cut = whole.read_bytes()[len(text) : len(text) + draw.randrange(60)].partition(b"\n")[0]
        out.write_bytes(text + cut)
    assert seen == sorted(seen)
    assert 0 < seen[0] < seen[-1] < len(questions)
    outcome = answer_questions(trained, questions, out, engine=TransformersEngine(trained, 1), max_new_tokens=8)
    assert outcome.answered == len(questions) - seen[-1]
    assert out.read_bytes() == whole.read_bytes()
    assert answer_questions(trained, questions, out, max_new_tokens=8).answered == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "whole.jsonl"]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def questions_file(path, questions):
    """A questions file, its images named by their file names."""
    rows = ({"question_id": one.id, "text": one.text} | ({"image": one.image.name} if one.image else {}) for one in questions)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_two_processes_write_what_one_does(tiny_llava, trained, questions, golden, tmp_path):
    """As torchrun starts them; and a file that two have begun goes on with one."""
    asked, images = questions_file(tmp_path / "q.jsonl", questions), golden / "trace" / "images"
    given = {"template": None, "max_new_tokens": 4, "batch_size": 1, "engine": "transformers", "precision": "fp32", "skip_bad": False}

    def run(out, world):
        port = free_port()

        def start(rank):
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            os.environ.update(zip(names, map(str, (rank, rank, world, "127.0.0.1", port)), strict=True))
            answer_file(tiny_llava, asked, images, out, **given, console=module.Console(quiet=True))

        pids = [in_a_child(lambda rank=rank: start(rank)) for rank in range(world)]
        for pid in pids:
            os.waitpid(pid, 0)

    run(tmp_path / "one.jsonl", 1)
    run(tmp_path / "two.jsonl", 2)
    one = (tmp_path / "one.jsonl").read_bytes()
    assert one.count(b"\n") == len(questions)
    assert (tmp_path / "two.jsonl").read_bytes() == one
    (tmp_path / "two.jsonl").write_bytes(one[: len(one) // 2])
    run(tmp_path / "two.jsonl", 2)
    assert (tmp_path / "two.jsonl").read_bytes() == one


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_do_not_change_the_file(trained, questions, tmp_path, batch_size):
    answer_questions(trained, questions, tmp_path / "a.jsonl", engine=TransformersEngine(trained, 5), max_new_tokens=6)
    answer_questions(trained, questions, tmp_path / "b.jsonl", engine=TransformersEngine(trained, batch_size), max_new_tokens=6)
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()


def test_a_file_of_something_else_is_refused_and_left_alone(trained, questions, tmp_path):
    few, out = questions[:3], tmp_path / "a.jsonl"
    answer_questions(trained, few, out, max_new_tokens=2)
    before = out.read_bytes()

    def refusal(asked=few, model=trained, limit=2):
        with pytest.raises(UserError) as problem:
            answer_questions(model, asked, out, max_new_tokens=limit)
        return str(problem.value)

    other = (
        f"--out: {out} holds answers of another model, template, precision, engine or limit of new tokens (line 1); give another --out, "
    )
    assert refusal(limit=3).startswith(other)
    assert refusal(model=trained.with_template("llava_v1")).startswith(other)
    assert refusal(model=replace(trained, identity="another")).startswith(other)
    assert refusal(model=replace(trained, name="another")).startswith(other)
    assert "holds answers to other questions (line 1)" in refusal([replace(one, id=f"{one.id}") for one in few])
    assert "(line 2)" in refusal([few[0], replace(few[1], text="Why?"), few[2]])
    for text in ("a poem\nof two lines\n", "a poem", '{"question_id": 9, "prompt": "x"}\n', "[" * 50_000 + "\n", '{"question_id": 0'):
        out.write_text(text)
        if text == '{"question_id": 0':
            answer_questions(trained, few, out, max_new_tokens=2)
            assert out.read_bytes() == before
            continue
        assert "give another --out, or remove it to answer anew" in refusal()
        assert out.read_text() == text
    out.write_bytes(before + before)
    assert "holds answers in another order (line 4)" in refusal()


def test_two_starts_at_once_are_refused(trained, questions, tmp_path):
    out, ready = tmp_path / "a.jsonl", tmp_path / "ready"

    class Waiting(TransformersEngine):
        def generate(self, prompts, max_new_tokens):
            ready.touch()
            time.sleep(30)
            yield from super().generate(prompts, max_new_tokens)

    pid = in_a_child(lambda: answer_questions(trained, questions, out, engine=Waiting(trained), max_new_tokens=2))
    try:
        while not ready.exists():
            time.sleep(0.01)
        with pytest.raises(UserError, match=r"^--out: another run is writing to .*; wait for it or give another file$"):
            answer_questions(trained, questions, out, max_new_tokens=2)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert answer_questions(trained, questions[:1], out, max_new_tokens=2).answered == 1


def bad_questions(questions, tmp_path):
    """Eight questions, the third, fifth and sixth of which cannot be asked."""
    good = Path(questions[0].image)
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:-200])
    os.mkfifo(tmp_path / "pipe.png")
    images = [good, good, tmp_path / "gone.png", good, tmp_path / "cut.png", tmp_path / "pipe.png", None, good.read_bytes()]
    return [Question(f"q{number}", "What?", image, "What?") for number, image in enumerate(images)]


def test_a_bad_image_is_one_line_that_names_the_question(trained, questions, tmp_path):
    asked, out = bad_questions(questions, tmp_path), tmp_path / "a.jsonl"
    with pytest.raises(
        UserError, match=r"^question q2: image .*gone\.png: is not there; so are those of 1 other questions; put it there, or "
    ):
        answer_questions(trained, asked, out, max_new_tokens=2)
    with pytest.raises(UserError, match=r"^question q4: image .*cut\.png: .*restore the file$"):
        answer_questions(trained, [one for one in asked if one.id not in ("q2", "q5")], out, max_new_tokens=2)
    odd = [Question(1, "?", b"GIF89a", "?"), Question(2, "?", tmp_path / "a\0b", "?"), Question(3, "half \ud800", None, "?")]
    most = trained.model.origin.text["max_position_embeddings"]
    odd.append(Question(4, "long " * most, None, "?"))
    answer_questions(trained, odd, tmp_path / "odd.jsonl", max_new_tokens=2, skip_bad=True)
    reasons = [json.loads(line)["reason"] for line in skipped_file(tmp_path / "odd.jsonl").read_text().splitlines()]
    assert reasons[0].startswith("its image: the header is broken")
    assert "is no path" in reasons[1]
    assert "half of a character" in reasons[2]
    assert reasons[3].endswith(f" tokens, and the model reads {most:,}; shorten it")
    assert not (tmp_path / "odd.jsonl").read_bytes()


def test_skip_bad_answers_the_rest_and_lists_them(trained, questions, tmp_path):
    asked, out = bad_questions(questions, tmp_path), tmp_path / "a.jsonl"
    outcome = answer_questions(trained, asked, out, engine=TransformersEngine(trained, 1), max_new_tokens=2, skip_bad=True)
    assert [one.question.id for one in outcome.left_out] == ["q2", "q4", "q5"]
    assert [answer.id for answer in read_answers(out).whole()] == ["q0", "q1", "q3", "q6", "q7"]
    listed = [json.loads(line) for line in skipped_file(out).read_text().splitlines()]
    assert [(row["question_id"], row["line"]) for row in listed] == [("q2", 3), ("q4", 5), ("q5", 6)]
    assert "no regular file" in listed[2]["reason"]
    # The same again does nothing; once their images are there, the missing lines come into their places.
    before = out.read_bytes()
    again = answer_questions(trained, asked, out, max_new_tokens=2, skip_bad=True)
    assert (again.answered, len(again.left_out), out.read_bytes()) == (0, 3, before)
    for one in asked:
        if one.id in ("q2", "q4", "q5"):
            Path(one.image).unlink(missing_ok=True)
            Image.new("RGB", (30, 20), "red").save(one.image)
            if one.id == "q2":
                mended = answer_questions(trained, asked, out, max_new_tokens=2, skip_bad=True)
                assert (mended.answered, len(mended.left_out)) == (1, 2)
    assert answer_questions(trained, asked, out, max_new_tokens=2).answered == 2
    assert not skipped_file(out).exists()
    answer_questions(trained, asked, tmp_path / "b.jsonl", max_new_tokens=2)
    assert out.read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_what_comes_after_a_mended_question_survives_a_kill(trained, questions, tmp_path, monkeypatch):
    asked, out = bad_questions(questions, tmp_path), tmp_path / "a.jsonl"
    answer_questions(trained, asked, out, max_new_tokens=2, skip_bad=True)
    Image.new("RGB", (30, 20), "red").save(tmp_path / "gone.png")

    def killed(*_):
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "generate", killed)
        with pytest.raises(KeyboardInterrupt):
            answer_questions(trained, asked, out, max_new_tokens=2, skip_bad=True)
    assert out.read_bytes().count(b"\n") == 2
    outcome = answer_questions(trained, asked, out, max_new_tokens=2, skip_bad=True)
    assert outcome.answered == 1
    assert [answer.id for answer in read_answers(out).whole()] == ["q0", "q1", "q2", "q3", "q6", "q7"]


def test_a_line_carries_the_questions_own_fields(trained, questions, tmp_path):
    asked = [replace(questions[0], prompt="short form", fields={"round_id": 0, "option_char": ["A", "B"]})]
    answer_questions(trained, asked, tmp_path / "a.jsonl", max_new_tokens=2)
    (answer,) = read_answers(tmp_path / "a.jsonl").whole()
    assert answer.prompt == "short form"
    assert (answer.fields["round_id"], answer.fields["option_char"]) == (0, ["A", "B"])


def test_it_says_what_it_did(trained, questions, tmp_path, capsys):
    answer_questions(trained, questions, tmp_path / "a.jsonl", max_new_tokens=1, console=module.Console(width=200))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("answered 1/30  ")
    assert said[0].endswith(" min left")
    assert said[1].startswith("answered 30/30  ")
    assert said[2].startswith("answered 30 questions in ")
    assert "of these answers had not ended after 1 tokens; --max-new-tokens is that limit" in said[3]


def test_mistakes_of_the_command_line_are_one_line(tiny_llava, trained, tmp_path):
    given = {"template": None, "max_new_tokens": 4, "batch_size": 1, "engine": "transformers", "precision": "auto", "skip_bad": False}
    (tmp_path / "q.jsonl").write_text("\n")
    console = module.Console(quiet=True)
    with pytest.raises(UserError, match=r"^--images: .*nowhere is no folder"):
        answer_file(tiny_llava, tmp_path / "q.jsonl", tmp_path / "nowhere", tmp_path / "a.jsonl", **given, console=console)
    with pytest.raises(UserError, match=r"^--questions: .* holds no question"):
        answer_file(tiny_llava, tmp_path / "q.jsonl", None, tmp_path / "a.jsonl", **given, console=console)
    (tmp_path / "q.jsonl").write_text('{"question_id": true, "text": "What?"}')
    with pytest.raises(UserError, match=r"question_id is bool; write a number or a string$"):
        answer_file(tiny_llava, tmp_path / "q.jsonl", None, tmp_path / "a.jsonl", **given, console=console)
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "text": "What?"}')
    with pytest.raises(UserError, match=r"^--out: .* cannot be written \(Is a directory\)"):
        answer_file(tmp_path / "read after out", tmp_path / "q.jsonl", None, tmp_path, **given, console=console)
    with pytest.raises(UserError, match=r"^--engine: no engine 'sglang'; write one of transformers, vllm$"):
        make_engine("sglang", trained, 8)
    with pytest.raises(UserError, match=r"^--batch-size: 0 is no number"):
        make_engine("transformers", trained, 0)
    with pytest.raises(UserError, match=r"^--max-new-tokens: 0 is no number"):
        answer_questions(trained, [], tmp_path / "a.jsonl", max_new_tokens=0)
    with pytest.raises(UserError, match=r"^--out: .* cannot be written \(Is a directory\); give a file that can$"):
        answer_questions(trained, [], tmp_path)
