"""Evaluation while a run trains: nothing of the training changes, and the held-out loss is plain PyTorch's."""

import json
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from parallel_runs import start, stop_after
from rich.console import Console
from safetensors.torch import load_file

from fastllava.certify.plain import PlainLlava, collate
from fastllava.config import check_config
from fastllava.data import loader
from fastllava.data.checks import BadRecord
from fastllava.data.conversation import prompt
from fastllava.data.images import ImageError, load_image
from fastllava.data.loader import Sample, pack, read_sample
from fastllava.data.plan import held_out_of
from fastllava.data.prepared import PreparedSet
from fastllava.data.templates import template
from fastllava.data.tokenizer import Tokenizer
from fastllava.errors import UserError
from fastllava.model.execution import Execution
from fastllava.model.llava import Llava
from fastllava.model.ops import reference_ops
from fastllava.model.weights import load_llava
from fastllava.train import held_out, run, samples
from fastllava.train.metrics.log import read_evaluations, read_metrics

NUMBERS = ("step", "loss", "grad_norm", "lr", "samples", "tokens", "supervised_tokens")
PLAINLY = 1e-5
"""Relative distance of the held-out loss to plain PyTorch's on padded batches."""


def quiet():
    return Console(file=open(os.devnull, "w"))


def train(values, said=None):
    return run(check_config(values), Console(file=said, width=1000) if said else quiet())


def numbers(output_dir):
    return [{key: row[key] for key in NUMBERS} for row in read_metrics(output_dir)]


def evaluations(output_dir):
    """The rows without their seconds, as the file has them: twice where they are twice."""
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "eval_seconds"} for row in rows if "eval_seconds" in row]


def same_training(one, other):
    assert numbers(one) == numbers(other) != []
    names = sorted(path.name for path in other.glob("*.safetensors"))
    assert sorted(path.name for path in one.glob("*.safetensors")) == names != []
    for name in names:
        found, expected = load_file(one / name), load_file(other / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


@pytest.fixture
def held(world, tmp_path):
    """`held(stage)`: a file of 11 records that are trained on by no run, for a stage."""

    def write(stage="finetune"):
        records = json.loads((world / ("captions.json" if stage == "pretrain" else "chats.json")).read_text())[:11]
        for record in records:
            record["id"] = f"held {record['id']}"
            record["conversations"][-1]["value"] += " now"
        path = tmp_path / f"held_{stage}.json"
        path.write_text(json.dumps(records))
        return str(path)

    return write


def plain_loss(config, prepared, numbers, model):
    """The mean over the supervised tokens of these samples, by padded batches of two."""
    spec, total = model.spec, 0.0
    plain = PlainLlava(model, "finetune", torch.float32, torch.device("cpu"), config.data.max_tokens)
    with torch.no_grad():
        for begin in range(0, len(numbers), 2):
            read = [read_sample(prepared, spec, config.data, int(i), 1.0) for i in numbers[begin : begin + 2]]
            total += float(plain.loss(collate(read, spec.size)))
    return total / int(prepared.n_supervised[numbers].sum())


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_training_is_bit_for_bit_the_one_without_it(stage, settings, held, tmp_path):
    looked_at = {"held_out": held(stage), "every_steps": 2, "samples": 3, "max_new_tokens": 4}
    values = settings(stage, train={"max_steps": 5}, data={"workers": 1})
    train({**values, "output_dir": str(tmp_path / "on"), "eval": looked_at})
    train({**values, "output_dir": str(tmp_path / "off")})
    same_training(tmp_path / "on", tmp_path / "off")
    rows = read_evaluations(tmp_path / "on")
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    assert all(row["held_out_samples"] == 11 and row["eval_seconds"] > 0 for row in rows)
    assert len({row["held_out_loss"] for row in rows}) == 4
    assert all(list(one) == ["id", "image", "question", "answer", "reference"] for one in rows[0]["samples"] if "image" in one)
    assert [len(row["samples"]) for row in rows] == [3] * 4
    summary = json.loads((tmp_path / "on" / "run_summary.json").read_text())
    assert summary["held_out_loss"] == rows[-1]["held_out_loss"]
    assert (summary["evaluations"], summary["held_out_step"], summary["held_out"]) == (4, 5, 11)
    assert summary["eval_seconds"] == pytest.approx(sum(row["eval_seconds"] for row in rows))
    assert read_evaluations(tmp_path / "off") == []


def test_the_held_out_loss_is_plain_pytorch_s(settings, held, tmp_path):
    """At the start and at the end; the cut at data.max_tokens and samples without a picture are in it."""
    values = settings("finetune", train={"max_steps": 6, "loss_norm": "llava"}, data={"max_tokens": 155})
    values["eval"] = {"held_out": held(), "every_steps": 100}
    config = check_config(values)
    summary = run(config, quiet()).summary
    first, last = read_evaluations(tmp_path / "run")
    found = {row["held_out_set"] for row in (first, last)}
    assert len(found) == 1
    prepared = next(
        one
        for path in Path(summary["prepared"]).parent.iterdir()
        if path.is_dir() and len(one := PreparedSet.open(path)) == 11 and one.manifest["where"]["records"] == values["eval"]["held_out"]
    )
    assert prepared.manifest["truncated"] > 0
    assert 0 in prepared.n_images
    assert (first["held_out_tokens"], first["held_out_samples"]) == (int(prepared.n_supervised.sum()), 11)
    for row, source in (
        (first, config.model),
        (last, config.model.model_copy(update={"llm": tmp_path / "run", "projector": None})),
    ):
        model = load_llava(source, Execution(reference_ops(), torch.float32), config.train.seed)
        assert row["held_out_loss"] == pytest.approx(plain_loss(config, prepared, np.arange(11), model), rel=PLAINLY)


@pytest.mark.parametrize("group_by_modality", [True, False])
def test_a_share_is_never_trained_on_and_the_rest_as_if_it_were_not_there(group_by_modality, settings, world, tmp_path, monkeypatch):
    read: list[str] = []
    honest = loader.read_sample

    def noted(prepared, spec, data, index, weight):
        read.append((prepared.row(index).id, weight))
        return honest(prepared, spec, data, index, weight)

    monkeypatch.setattr(loader, "read_sample", noted)
    values = settings("finetune", train={"epochs": 2}, data={"group_by_modality": group_by_modality})
    train({**values, "output_dir": str(tmp_path / "share"), "eval": {"held_out": 0.2, "samples": 2, "max_new_tokens": 2}})
    records = json.loads((world / "chats.json").read_text())
    out = {records[i]["id"] for i in held_out_of(len(records), 0.2, 42).tolist()}
    assert len(out) == 6
    trained = [name for name, weight in read if weight != 1.0]
    assert sorted(trained) == sorted(2 * [one["id"] for one in records if one["id"] not in out])
    assert {name for name, weight in read if weight == 1.0} == out
    [row] = read_evaluations(tmp_path / "share")
    assert {one["id"] for one in row["samples"]} <= out

    (tmp_path / "rest.json").write_text(json.dumps([one for one in records if one["id"] not in out]))
    values["data"]["records"] = str(tmp_path / "rest.json")
    train({**values, "output_dir": str(tmp_path / "rest")})
    same_training(tmp_path / "share", tmp_path / "rest")


def test_records_that_are_trained_on_too_are_said(settings, world, tmp_path, capsys):
    values = settings("finetune", train={"max_steps": 1}, eval={"held_out": str(world / "texts.json")})
    run(check_config(values), Console(width=1000))
    assert "note: 8 of the held-out samples are word for word trained on too" in capsys.readouterr().out


@pytest.mark.parametrize("killed_at", [2, 8])
def test_killed_within_an_evaluation_no_row_is_lost_or_doubled(killed_at, settings, held, tmp_path, monkeypatch):
    values = settings("finetune", train={"max_steps": 7, "checkpoint_steps": 3})
    values["eval"] = {"held_out": held(), "every_steps": 3, "samples": 2, "max_new_tokens": 2}
    train({**values, "output_dir": str(tmp_path / "whole")})
    honest, calls = Llava.logits, []

    def dies(*given):
        calls.append(1)
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        return honest(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Llava, "logits", dies)
        with pytest.raises(KeyboardInterrupt):
            train(values)
    train(values)
    same_training(tmp_path / "run", tmp_path / "whole")
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "whole")
    assert [row["step"] for row in evaluations(tmp_path / "run")] == [0, 3, 6, 7]


@pytest.mark.exhaustive
def test_kill_9_at_random_moments_leaves_the_rows_of_an_unbroken_run(settings, held, tmp_path):
    values = settings("finetune", data={"workers": 1}, train={"max_steps": 12, "checkpoint_steps": 3})
    values["eval"] = {"held_out": held(), "every_steps": 2, "samples": 2, "max_new_tokens": 3}
    moments = random.Random(os.environ.get("KILL_SEED", "0"))
    for point in (2, 5, 9):
        process = start(values, tmp_path / "said")
        while len(read_metrics(tmp_path / "run")) <= point:
            assert process.is_alive(), (tmp_path / "said").read_text()
            time.sleep(0.002)
        time.sleep(moments.random() * 0.2)
        process.kill()
        process.join()
    train(values)
    train({**values, "output_dir": str(tmp_path / "whole")})
    same_training(tmp_path / "run", tmp_path / "whole")
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "whole")


def test_it_may_be_turned_on_and_off_in_the_middle_but_a_share_may_not(settings, held, tmp_path):
    values = settings("finetune", train={"max_steps": 8, "checkpoint_steps": 2})
    train({**values, "output_dir": str(tmp_path / "off")})

    for stop, looked_at in (
        (2, {}),
        (3, {"held_out": held(), "every_steps": 1}),
        (None, {"samples": 1, "max_new_tokens": 1, "every_steps": 3}),
    ):
        with pytest.MonkeyPatch.context() as patch:
            if stop is not None:
                stop_after(patch, stop)
            train({**values, "eval": looked_at})
    same_training(tmp_path / "run", tmp_path / "off")
    assert [(row["step"], "samples" in row) for row in evaluations(tmp_path / "run")] == [(2, 0), (3, 0), (4, 0), (6, 1), (8, 1)]
    with pytest.raises(UserError, match=r"eval.held_out was None and is now 0.1; change that back"):
        train({**values, "eval": {"held_out": 0.1}})


def test_a_stop_within_an_evaluation_acts_at_once(settings, held, tmp_path, monkeypatch):
    values = settings("finetune", train={"max_steps": 5})
    values["eval"] = {"held_out": held(), "every_steps": 2, "samples": 4, "max_new_tokens": 8}
    train({**values, "output_dir": str(tmp_path / "whole")})
    honest, calls, step = Llava.logits, [], 0

    def stops(*given):
        if len(numbers(tmp_path / "run")) == step:
            calls.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(*given)

    for step in (0, 4, 5):
        with monkeypatch.context() as patch:
            patch.setattr(Llava, "logits", stops)
            calls.clear()
            assert train(values).stopped_by is signal.SIGTERM
        assert len(calls) == 1
        assert len(numbers(tmp_path / "run")) == step
    assert train(values).stopped_by is None
    same_training(tmp_path / "run", tmp_path / "whole")
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "whole")


def test_a_held_out_image_that_cannot_be_read_any_more_is_left_out_and_said(settings, held, tmp_path, monkeypatch, capsys):
    values = settings("finetune", train={"max_steps": 3}, eval={"held_out": held(), "every_steps": 2, "samples": 11, "max_new_tokens": 1})
    train({**values, "output_dir": str(tmp_path / "off"), "eval": {}})
    honest = loader.load_image

    def load_image(path, *given):
        if path.name == "3.png" and len(read_metrics(tmp_path / "run")) >= 2 and evaluating:
            raise ImageError(path, BadRecord("image_not_found", "there is no such file"))
        return honest(path, *given)

    evaluating: list[int] = []
    for module, name in ((held_out.HeldOutEvaluation, "loss"), (samples.SampleAnswers, "rows")):
        method = getattr(module, name)

        def noted(self, *given, method=method):
            evaluating.append(1)
            found = method(self, *given)
            evaluating.pop()
            return found

        monkeypatch.setattr(module, name, noted)
    monkeypatch.setattr(loader, "load_image", load_image)
    monkeypatch.setattr(samples, "load_image", load_image)
    run(check_config(values), Console(width=1000))
    rows = read_evaluations(tmp_path / "run")
    assert [row["held_out_samples"] for row in rows] == [11, 10, 10]
    assert [one["answer"] is None for one in rows[0]["samples"]] == [False] * 11
    assert [one["image"] for one in rows[1]["samples"] if one["answer"] is None] == ["3.png"]
    said = capsys.readouterr().out
    assert "held out no more, as it cannot be read: record held chat3" in said
    assert "question held chat3 is not asked, as its image 3.png there is no such file" in said
    same_training(tmp_path / "run", tmp_path / "off")


def test_too_little_memory_for_an_evaluation_names_the_keys_and_keeps_the_state(settings, held, tmp_path, monkeypatch):
    values = settings("finetune", train={"max_steps": 4, "micro_batch_tokens": 400}, eval={"held_out": held(), "every_steps": 2})
    honest = Llava.forward

    def forward(model, batch):
        if not torch.is_grad_enabled() and len(read_metrics(tmp_path / "run")) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Llava, "forward", forward)
        with pytest.raises(UserError, match=r"eval: to evaluate 400 tokens .*; write train.micro_batch_tokens=200, or leave eval.held_out"):
            train(values)
    said = (tmp_path / "said").open("w")
    train({**values, "eval": {}}, said)
    assert "resuming before step 2" in (tmp_path / "said").read_text()


def test_the_time_of_an_evaluation_is_no_step_s(settings, held, tmp_path, monkeypatch):
    honest = held_out.HeldOutEvaluation.loss

    def slow(*given):
        if len(read_metrics(tmp_path / "run")) == 1:
            time.sleep(3.0)
        return honest(*given)

    monkeypatch.setattr(held_out.HeldOutEvaluation, "loss", slow)
    train(settings("finetune", train={"max_steps": 2}, eval={"held_out": held(), "every_steps": 1}))
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 2
    assert max(row["step_seconds"] for row in rows) < 3.0
    assert max(row["eval_seconds"] for row in read_evaluations(tmp_path / "run")) >= 3.0


def questions_of(tmp_path, *rows):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


def test_a_file_of_questions_is_asked_in_its_order_as_the_model_answers_alone(settings, tmp_path):
    rows = [
        {"question_id": 9, "text": "Which colour?", "image": "2.png"},
        {"question_id": "b", "text": "Count to 5."},
        {"question_id": 9, "text": "Are you sure?", "image": "0.png"},
    ]
    values = settings("finetune", train={"max_steps": 1}, eval={"samples": questions_of(tmp_path, *rows), "max_new_tokens": 6})
    values["eval"]["every_steps"] = 1
    config = check_config(values)
    run(config, quiet())
    row, _ = read_evaluations(tmp_path / "run")
    assert "held_out_loss" not in row
    assert [(one["id"], one["question"], one.get("image")) for one in row["samples"]] == [
        (one["question_id"], one["text"], one.get("image")) for one in rows
    ]
    tokenizer = Tokenizer.load(config.model.llm)
    model = load_llava(config.model, Execution(reference_ops(), torch.float32), config.train.seed)
    answers = []
    for one in rows:
        # One token after another, of this question alone, by the logits of all rows.
        pictures = [load_image(config.data.images / one["image"], "pad", model.spec, config.data)] if "image" in one else []
        ids = prompt("v1", one["text"], bool(pictures), tokenizer)
        new = []
        while len(new) < 6 and new[-1:] != [tokenizer.eos_id]:
            sample = Sample(np.array(ids + new, np.int32), np.zeros((0, 2), np.int32), pictures, 0.0)
            with torch.no_grad():
                new.append(int(model.logits(pack([sample], model.spec, 2048))[-1].argmax()))
        answers.append(tokenizer.decode(new).strip())
    assert [one["answer"] for one in row["samples"]] == answers
    assert any(answers)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"question_id": 1'], "questions.jsonl: line 1 is no JSON"),
        ([{"question_id": 1, "text": "a"}, {"text": "b"}], "line 2 of .*questions.jsonl is no question; write question_id, text and"),
        ([{"question_id": 1, "text": "a", "image": "none.png"}], "line 1 of .*: its image .*no such file"),
        ([{"question_id": 1, "text": "a", "image": "../llm/config.json"}], "line 1 of .*: its image .* leads out of data.images"),
        ([{"question_id": 1, "text": "word " * 3000}], "line 1 of .* leaves no room for an answer in data.max_tokens=2048; shorten it"),
        ([""], "holds no question; write one JSON object"),
    ],
)
def test_a_question_that_cannot_be_asked_is_named_before_anything_is_trained(rows, message, settings, tmp_path):
    values = settings("finetune", eval={"samples": questions_of(tmp_path, *rows)})
    with pytest.raises(UserError, match=f"^eval.samples: .*{message}"):
        train(values)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_is_wrong_with_the_held_out_file_names_its_key(settings, tmp_path, world):
    (tmp_path / "bad.json").write_text(json.dumps([{"id": 1, "conversations": []}, *json.loads((world / "texts.json").read_text())]))
    wrong = {"none.json": ".*none.json cannot be read", "bad.json": "data.max_quarantined_share: .* are bad"}
    for name, message in wrong.items():
        with pytest.raises(UserError, match=f"^eval.held_out: {message}"):
            train(settings("finetune", eval={"held_out": str(tmp_path / name)}))


def test_an_answer_ends_where_the_template_ends_one(world):
    tokenizer = Tokenizer.load(world / "llm")
    # As in Llama's tokenizer a token of its own, though this one never makes it of a text.
    line_end = next(i for i in range(tokenizer.vocab_size) if tokenizer.piece(i) == "<0x0A>")
    ids = [*tokenizer.encode("red"), line_end, *tokenizer.encode("### Human")]
    for name, kept in {"plain": "red", "v0": "red", "v1": "red\n ### Human"}.items():
        answers = samples.Answers(tokenizer, template(name))
        assert answers.text(ids) == kept
        assert answers.ended(ids) == (name != "v1")
        assert not answers.ended(tokenizer.encode("red"))
        assert answers.ended([*ids, tokenizer.eos_id])
    assert samples.Answers(tokenizer, template("v1")).text([*tokenizer.encode("red"), tokenizer.eos_id]) == "red"


def test_rows_of_steps_are_read_without_those_of_evaluations_and_damaged_ones_are_neither(tmp_path):
    step = dict.fromkeys(("loss", "lr", "samples", "tokens", "supervised_tokens", "step_seconds", "data_wait_seconds"), 1.0)
    good = [{"step": 0, "eval_seconds": 1.0, "held_out_loss": None}, {"step": 0, **step}, {"step": 1, "eval_seconds": 2.0, "samples": []}]
    bad = [{"step": -1, "eval_seconds": 1.0}, {"eval_seconds": 1.0}, {"step": 1, "eval_seconds": None}, {"step": 0.5, "eval_seconds": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*good, *bad)) + '{"step": 2, "eval_se')
    assert read_metrics(tmp_path) == [good[1]]
    assert read_evaluations(tmp_path) == [good[0], good[2]]
