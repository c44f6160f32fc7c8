"""What a run finds in its output_dir: the same training goes on, and nothing else does in silence."""

import json
import os
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from fastllava.config import check_config
from fastllava.errors import UserError
from fastllava.export import export
from fastllava.model.execution import Execution
from fastllava.model.ops import reference_ops
from fastllava.model.weights import load_llava
from fastllava.train import run
from fastllava.train.state import checkpoint
from fastllava.train.state.fingerprint import differences, fingerprint

RESULT = "mm_projector.safetensors"


@pytest.fixture
def own(settings, world, tmp_path):
    """Settings of a short run of stage pretrain whose models lie in folders of its own; and what the run says, line by line."""
    for part in ("llm", "clip"):
        shutil.copytree(world / part, tmp_path / part)
    places = {"llm": str(tmp_path / "llm"), "vision_tower": str(tmp_path / "clip")}
    return settings(model=places, train={"max_steps": 4, "checkpoint_steps": 2})


def train(values, said=None):
    with open(said or os.devnull, "w") as file:
        return run(check_config(values), Console(file=file, width=2000)).summary


def names(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def stopped(out, *gone):
    """Make a finished run look like one that was killed, without some of its checkpoints."""
    (out / "run_summary.json").unlink()
    for name in gone:
        shutil.rmtree(out / name)


def change_weights(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    first = sorted(tensors)[0]
    save_file({**tensors, first: tensors[first] + 0.5}, path, metadata={"format": "pt"})


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def load(values):
    return load_llava(check_config(values).model, Execution(reference_ops(), torch.float32), 0)


def test_a_fingerprint_is_of_content_and_not_of_files(own, tmp_path):
    before = fingerprint(load(own))
    tensors = load_file(tmp_path / "llm" / "model.safetensors")
    (tmp_path / "llm" / "model.safetensors").unlink()
    half = len(tensors) // 2
    pieces = [dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])]
    index = {}
    for number, piece in enumerate(pieces):
        torch.save(piece, tmp_path / "llm" / f"part{number}.bin")
        index |= dict.fromkeys(piece, f"part{number}.bin")
    (tmp_path / "llm" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "llm").rename(tmp_path / "elsewhere")
    own["model"]["llm"] = str(tmp_path / "elsewhere")
    assert fingerprint(load(own)) == before
    assert before["model.projector"]["weights"] == "drawn"


def test_a_fingerprint_is_read_back_from_json_as_it_was(own):
    start = fingerprint(load(own))
    assert differences(start, json.loads(json.dumps(start))) == {}
    assert differences(start, {}) == {}, "an old checkpoint says nothing"


CHANGES = {
    "tower": (lambda root: change_weights(root / "clip"), r"model\.vision_tower: its weights are not those that the run began with"),
    "llm": (lambda root: change_weights(root / "llm"), r"model\.llm: its weights are not"),
    "rope": (
        lambda root: change_config(root / "llm", rope_theta=5.0, rope_parameters=None),
        r"model\.llm: its rope_theta was .* is now 5\.0",
    ),
    "eps": (lambda root: change_config(root / "llm", rms_norm_eps=0.5), r"model\.llm: its rms_norm_eps was .* is now 0\.5"),
    "act": (
        lambda root: change_config(root / "clip", hidden_act="gelu"),
        r"model\.vision_tower: its hidden_act was quick_gelu .* now gelu",
    ),
}


def test_a_model_replaced_in_place_is_another_training(own, tmp_path):
    train(own)
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    stopped(tmp_path / "run", "checkpoint-4")
    for part in ("llm", "clip"):
        shutil.copytree(tmp_path / part, tmp_path / f"{part}.kept")
    for change, words in CHANGES.values():
        change(tmp_path)
        for out in ("run", "whole"):
            with pytest.raises(UserError, match=f"holds a run of another training: .*{words}") as error:
                train({**own, "output_dir": str(tmp_path / out)})
            assert len(str(error.value).splitlines()) == 1
        with pytest.raises(UserError, match=words):
            export(tmp_path / "run" / "checkpoint-2", "llava", tmp_path / "out", lambda _: None)
        for part in ("llm", "clip"):
            shutil.rmtree(tmp_path / part)
            shutil.copytree(tmp_path / f"{part}.kept", tmp_path / part)


def test_the_same_model_in_another_place_is_the_same_training(own, tmp_path):
    train(own)
    stopped(tmp_path / "run", "checkpoint-4")
    (tmp_path / "clip").rename(tmp_path / "moved")
    own["model"]["vision_tower"] = str(tmp_path / "moved")
    assert train(own, tmp_path / "said")["status"] == "complete"
    said = (tmp_path / "said").read_text()
    assert f"model.vision_tower was {tmp_path / 'clip'} and is now {tmp_path / 'moved'}: the same model in another place" in said
    assert "resuming before step 2" in said


def test_a_checkpoint_without_hashes_of_weights_goes_on_and_says_so(own, tmp_path):
    train(own)
    stopped(tmp_path / "run", "checkpoint-4")
    folder = tmp_path / "run" / "checkpoint-2"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({key: value for key, value in state.items() if key not in ("start", "run")}))
    manifest = json.loads((folder / "manifest.json").read_text())
    from fastllava.disk import described

    (folder / "manifest.json").write_text(json.dumps({**manifest, "state.json": described(folder / "state.json")}))
    train(own, tmp_path / "said")
    assert "kept no hashes of weights" in (tmp_path / "said").read_text()


def test_without_manifests_nothing_begins_anew(own, tmp_path):
    train(own)
    stopped(tmp_path / "run")
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        (folder / "manifest.json").unlink()
    rows = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged .*progress\.json to start anew"):
        train(own)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == rows
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"had come to step 4, and its checkpoints are gone; .*or remove progress\.json there to"):
        train(own)
    (tmp_path / "run" / "progress.json").unlink()
    assert train(own)["status"] == "complete", "the remedy works"


def test_a_run_killed_before_its_first_checkpoint_begins_anew_and_says_so(own, tmp_path, monkeypatch):
    import fastllava.train.loop as module

    def dies(*_):
        raise KeyboardInterrupt

    own["train"] |= {"checkpoint_steps": 3}
    honest, calls = module.train_step, []
    monkeypatch.setattr(module, "train_step", lambda *args: calls.append(1) or (dies if len(calls) == 3 else honest)(*args))
    with pytest.raises(KeyboardInterrupt):
        train(own)
    monkeypatch.setattr(module, "train_step", honest)
    with pytest.raises(UserError, match=r"another training: optim\.lr was"):
        train({**own, "optim": {"lr": 0.5}})
    assert train(own, tmp_path / "said")["status"] == "complete"
    assert "steps in metrics.jsonl are taken again" in (tmp_path / "said").read_text()


def test_a_folder_with_a_model_of_somebody_else_is_never_written_over(own, tmp_path):
    before = (tmp_path / "llm" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"output_dir: .*/llm holds config\.json, model\.safetensors and no run_config\.json"):
        train({**own, "output_dir": str(tmp_path / "llm")})
    assert (tmp_path / "llm" / "model.safetensors").read_bytes() == before


def test_a_damaged_newest_checkpoint_is_told_on_screen_and_in_the_summary(own, tmp_path):
    train(own)
    stopped(tmp_path / "run")
    with (tmp_path / "run" / "checkpoint-4" / "state.json").open("a") as file:
        file.write(" ")
    summary = train(own, tmp_path / "said")
    said = (tmp_path / "said").read_text()
    assert "checkpoint-4: file state.json was added or changed" in said
    assert "going on from checkpoint-2, as checkpoint-4 cannot be used: the steps from 2 on are taken again" in said
    assert len(summary["notes"]) == 2
    assert "checkpoint-4: file state.json" in summary["notes"][0]


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_result_is_named_and_written_again(damage, own, tmp_path):
    train(own)
    path = tmp_path / "run" / RESULT
    whole = path.read_bytes()
    harm = {"missing": b"", "cut": whole[:-1], "flipped": whole[:-1] + bytes([whole[-1] ^ 1])}[damage]
    path.write_bytes(harm) if harm else path.unlink()
    with pytest.raises(UserError, match=rf"CHECKPOINT: .*but its {RESULT} is (missing|not as it was written); start its training again"):
        export(tmp_path / "run", "llava", tmp_path / "out", lambda _: None)
    with pytest.raises(UserError, match=rf"model\.projector: .*(but its {RESULT} is not as it was written|does not exist)"):
        train({**own, "output_dir": str(tmp_path / "next"), "model": {**own["model"], "projector": str(path)}})
    train(own, tmp_path / "said")
    assert f"but its {RESULT} is" in (tmp_path / "said").read_text()
    assert path.read_bytes() == whole
    train(own, tmp_path / "said")
    assert "complete: nothing to do" in (tmp_path / "said").read_text()


def test_a_complete_run_of_a_version_with_fewer_keys_is_complete(own, tmp_path):
    """Keys that have come since have their defaults, which are what that version did."""
    train(own)
    for name in ("run_summary.json", "run_config.json"):
        path = tmp_path / "run" / name
        written = json.loads(path.read_text())
        config = written["config"] if name == "run_summary.json" else written
        del config["lora"], config["data"]["max_images"], config["train"]["deterministic"]
        path.write_text(json.dumps(written))
    train(own, tmp_path / "said")
    assert "complete: nothing to do" in (tmp_path / "said").read_text()


def test_a_damaged_result_without_a_checkpoint_is_one_line(own, tmp_path):
    own["train"] |= {"checkpoint_steps": None, "checkpoint_minutes": None}
    train(own)
    assert names(tmp_path / "run") == [], "checkpoints are off, and the result is whole"
    (tmp_path / "run" / RESULT).unlink()
    with pytest.raises(UserError, match=rf"complete, but its {RESULT} is missing, and no checkpoint is left to write it from"):
        train(own)


def test_a_result_that_cannot_be_written_leaves_the_last_state(own, tmp_path, monkeypatch):
    import fastllava.model.weights.write as module

    own["train"] |= {"checkpoint_steps": None, "checkpoint_minutes": None}
    honest = module.save_file

    def full(*_, **__):
        from safetensors import SafetensorError

        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(UserError, match=r"did not take the result .*No space left on device \(.* needed, .* free in .*checkpoint-4"):
        train(own)
    monkeypatch.setattr(module, "save_file", honest)
    train(own, tmp_path / "said")
    assert "resuming before step 4" in (tmp_path / "said").read_text()
    assert (tmp_path / "run" / RESULT).exists()


def test_counts_come_from_the_plan(own, tmp_path):
    whole = train(own)
    stopped(tmp_path / "run", "checkpoint-4")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))
    again = train(own)
    counted = ("steps", "samples", "tokens", "supervised_tokens", "final_loss")
    assert {key: again[key] for key in counted} == {key: whole[key] for key in counted}
    assert again["steps_in_metrics"] == 3


def test_rotation_counts_whole_checkpoints_of_this_run_alone(config, tmp_path):
    from test_checkpoint import trained

    def save(step, run="mine"):
        return checkpoint.save(tmp_path, step, config, "digest", *trained(config), run=run)

    save(2), save(4), save(5, run="another"), save(6), save(40)
    (tmp_path / "checkpoint-6" / "state.json").write_text("")
    (tmp_path / "checkpoint-40" / "tensors" / ".metadata").unlink()
    half, foreign = tmp_path / "checkpoint-1", tmp_path / "checkpoint-3"
    shutil.copytree(tmp_path / "checkpoint-2", half)
    (half / "manifest.json").unlink()
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    written = save(8)
    checkpoint.keep_last(tmp_path, 1, written)
    left = ["checkpoint-3", "checkpoint-40", "checkpoint-5", "checkpoint-6", "checkpoint-8"]
    assert names(tmp_path) == left, "those of others, and those that are damaged, stay; half a removed one goes"
    save(10)
    checkpoint.keep_last(tmp_path, 2, tmp_path / "checkpoint-10", damaged=["checkpoint-8"])
    assert names(tmp_path) == sorted([*left, "checkpoint-10"])


def test_what_a_killed_removal_leaves_is_cleared(config, tmp_path):
    from test_checkpoint import trained

    for step in (2, 4):
        checkpoint.save(tmp_path, step, config, "digest", *trained(config))
    (tmp_path / "checkpoint-2").rename(tmp_path / ".checkpoint-2.removing")
    checkpoint.keep_last(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "progress.json"]
