"""A picture that turns bad after `prepare` is left out of its step, and the run goes on the same in every way."""

import io
import json
import os
import shutil

import pytest
import torch
from parallel_runs import launch, stop_after
from rich.console import Console
from safetensors.torch import load_file

from fastllava.config import check_config
from fastllava.errors import UserError
from fastllava.train import Trainer, run
from fastllava.train.dataset import prepare_data
from fastllava.train.metrics.log import read_metrics
from fastllava.train.state import checkpoint
from fastllava.train.state.set_aside import SET_ASIDE

NUMBERS = ("step", "loss", "grad_norm", "lr", "samples", "tokens", "supervised_tokens")


def train(values):
    said = io.StringIO()
    return run(check_config(values), Console(file=said, width=1000)), said.getvalue()


def numbers(folder):
    return [{key: row[key] for key in NUMBERS} for row in read_metrics(folder)]


def same(one, other):
    first, second = (load_file(folder / "mm_projector.safetensors") for folder in (one, other))
    return numbers(one) == numbers(other) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def values(settings, world, tmp_path):
    """Two epochs of 6 steps; step 2 and step 8 have cap9."""
    shutil.copytree(world / "images", tmp_path / "images")
    data = {"images": str(tmp_path / "images"), "shuffle": False, "workers": 0, "max_quarantined_share": 0.1}
    return settings(data={**data, "prepared_dir": str(tmp_path / "prepared")}, train={"epochs": 2, "checkpoint_steps": 3})


@pytest.fixture
def spoil_once_prepared(monkeypatch):
    """`spoil(deed)`: does it once the data have been opened and before the first step."""

    def spoil(deed):
        honest = Trainer.train
        monkeypatch.setattr(Trainer, "train", lambda self: (deed(), honest(self))[1])

    return spoil


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def folder(path):
    path.unlink()
    path.mkdir()


BAD = {
    "gone": lambda path: path.unlink(),
    "HTML": lambda path: path.write_text("<html>404</html>"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "another picture": lambda path: path.write_bytes(path.with_name("1.png").read_bytes()),
    "pipe": pipe,
    "folder": folder,
}


@pytest.mark.parametrize("kind", BAD)
def test_it_is_named_and_left_out_for_good(kind, values, tmp_path, spoil_once_prepared):
    spoil_once_prepared(lambda: BAD[kind](tmp_path / "images" / "9.png"))
    result, said = train({**values, "train": {**values["train"], "max_steps": 9}})
    assert "left out from step 2 on" in said
    assert "record cap9: " in said
    assert "without 1 samples set aside" in said
    assert [row["samples"] for row in read_metrics(tmp_path / "run")] == [4, 4, 3, 4, 4, 4, 4, 4, 3]
    assert (result.summary["set_aside"], result.summary["samples"]) == (1, 34)
    (entry,) = map(json.loads, (tmp_path / "run" / SET_ASIDE).read_text().splitlines())
    assert (entry["id"], entry["index"], entry["image"], entry["step"]) == ("cap9", 9, "9.png", 2)


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_stopped_and_resumed_is_the_same(stop, values, tmp_path, spoil_once_prepared):
    picture = tmp_path / "images" / "9.png"
    kept = picture.read_bytes()
    spoil_once_prepared(lambda: picture.unlink(missing_ok=True))
    train(values)
    picture.write_bytes(kept)
    broken = {**values, "output_dir": str(tmp_path / "broken")}
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, stop)
        train(broken)
    _, said = train(broken)
    assert "resuming before step" in said
    assert same(tmp_path / "run", tmp_path / "broken")
    assert checkpoint.newest(tmp_path / "run").set_aside == {9: 2}


@pytest.mark.parametrize("before", [True, False])
def test_a_finished_run_stays_one_when_its_picture_goes_or_comes_back(before, values, tmp_path):
    values["train"] = {**values["train"], "checkpoint_steps": None}
    picture, kept = tmp_path / "images" / "9.png", (tmp_path / "images" / "9.png").read_bytes()
    if before:
        picture.unlink()
    train(values)
    picture.write_bytes(kept) if before else picture.unlink()
    assert "nothing to do" in train(values)[1]


def test_a_line_by_hand_says_the_same(values, tmp_path, spoil_once_prepared):
    other = {**values, "output_dir": str(tmp_path / "by hand")}
    (tmp_path / "by hand").mkdir()
    (tmp_path / "by hand" / SET_ASIDE).write_text('{"id": "cap9"}\n')
    train(other)
    spoil_once_prepared((tmp_path / "images" / "9.png").unlink)
    train(values)
    assert same(tmp_path / "run", tmp_path / "by hand")


@pytest.mark.parametrize("line", ["{", "[]", '{"id": "nobody"}', '{"id": "cap9", "step": -1}'])
def test_a_line_that_means_nothing_is_named(line, values, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / SET_ASIDE).write_text(f'{{"id": "cap8"}}\n{line}\n')
    with pytest.raises(UserError, match=rf"{SET_ASIDE} line 2: "):
        train(values)


def test_too_many_stop_the_run_and_the_share_that_is_named_goes_on(values, tmp_path, spoil_once_prepared):
    values["data"]["max_quarantined_share"] = 0.01
    spoil_once_prepared(lambda: (tmp_path / "images" / "9.png").unlink(missing_ok=True))
    with pytest.raises(UserError, match=r"write data\.max_quarantined_share=0\.0418.*same command") as error:
        train(values)
    assert "record cap9" in str(error.value)
    assert checkpoint.newest(tmp_path / "run").step == 2
    values["data"]["max_quarantined_share"] = 0.0418
    assert train(values)[0].summary["set_aside"] == 1


@pytest.mark.parametrize("gone", [True, False])
def test_a_folder_that_goes_away_sets_nothing_aside(gone, values, tmp_path, spoil_once_prepared):
    def deed():
        (tmp_path / "images").rename(tmp_path / "elsewhere")
        if not gone:
            (tmp_path / "images").mkdir()

    spoil_once_prepared(deed)
    with pytest.raises(UserError, match=r"data\.images: .*same command again"):
        train(values)
    assert not (tmp_path / "run" / SET_ASIDE).exists()


def test_two_processes_agree(values, tmp_path):
    prepare_data(check_config(values), lambda _: None)
    launch(2, [({**values, "train": {**values["train"], "max_steps": 5}}, "picture gone")], tmp_path / "said")
    assert "left out from step" in (tmp_path / "said.0.0").read_text()
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 5
    assert sum(row["samples"] for row in rows) == 19
