"""What a run writes, says and refuses."""

import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from fastllava.batch import Batch
from fastllava.config import ParallelConfig, check_config
from fastllava.distributed.sharding import check_replicas
from fastllava.errors import UserError
from fastllava.export import export
from fastllava.train import run
from fastllava.train.metrics.log import read_metrics
from fastllava.train.metrics.summary import CLOSING_STEPS
from fastllava.train.state import checkpoint, shards

FASTLLAVA = Path(sys.executable).with_name("fastllava")


def quiet():
    return Console(file=open(os.devnull, "w"))


def train(values):
    return run(check_config(values), quiet())


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_loss_falls_and_the_files_of_a_run_are_there(stage, settings, tmp_path):
    result = train(settings(stage, train={"epochs": 4}))
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(result.summary["planned_steps"]))
    # Stage 1 trains the projector alone, in front of a decoder that knows nothing.
    assert rows[-1]["loss"] < rows[0]["loss"] - {"pretrain": 0.2, "finetune": 1.0}[stage]
    assert {"loss", "grad_norm", "lr", "samples", "tokens", "supervised_tokens", "step_seconds", "data_wait_seconds"} <= rows[0].keys()
    assert rows[0]["lr"] == 0.0
    assert rows[0]["samples"] == 4
    assert all(0 <= row["data_wait_seconds"] <= row["step_seconds"] for row in rows)
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "run" / "run_summary.json").read_text())
    assert summary["status"] == "complete"
    assert summary["samples"] == sum(row["samples"] for row in rows)
    assert 0 < summary["goodput"] < 1
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["config"]["stage"] == stage
    names = {"mm_projector.safetensors", "mm_projector.bin"} | ({"config.json", "model.safetensors"} if stage == "finetune" else set())
    assert names <= {path.name for path in (tmp_path / "run").iterdir()}
    projector = load_file(tmp_path / "run" / "mm_projector.safetensors")
    assert sorted(projector) == [f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("bias", "weight")]
    again = torch.load(tmp_path / "run" / "mm_projector.bin", weights_only=True)
    assert all(torch.equal(again[name], tensor) for name, tensor in projector.items())


def test_stage_2_starts_from_stage_1_and_trains_decoder_and_projector(settings, world, tmp_path):
    train(settings("pretrain", output_dir=str(tmp_path / "one")))
    handed = tmp_path / "one" / "mm_projector.safetensors"
    train(settings("finetune", output_dir=str(tmp_path / "two"), model={"projector": str(handed)}, train={"max_steps": 3}))
    before, after = load_file(world / "llm" / "model.safetensors"), load_file(tmp_path / "two" / "model.safetensors")
    unchanged = [name for name, tensor in before.items() if torch.equal(tensor, after[name])]
    assert unchanged == [], "every weight of the decoder trains in stage 2"
    start = load_file(handed)
    assert not torch.equal(start["model.mm_projector.0.weight"], after["model.mm_projector.0.weight"])
    tower = load_file(world / "clip" / "model.safetensors")
    for name, tensor in tower.items():
        plain = name.removeprefix("vision_model.")
        assert torch.equal(tensor, after[f"model.vision_tower.vision_tower.vision_model.{plain}"]), "the tower never trains"


def test_bf16_computes_in_bf16_and_keeps_fp32_masters(settings, tmp_path):
    result = train(settings("finetune", train={"precision": "bf16", "max_steps": 4, "checkpoint_steps": 2}))
    _, weights = checkpoint.read_model(tmp_path / "run" / "checkpoint-2")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    moved = weights["llm.lm_head.weight"]
    assert not torch.equal(moved, moved.bfloat16().float()), "the masters hold more than bf16 can"
    assert load_file(tmp_path / "run" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert result.summary["final_loss"] == pytest.approx(read_metrics(tmp_path / "run")[-1]["loss"])


def test_the_loss_that_a_run_ends_with_is_a_mean_and_called_one(settings, tmp_path):
    said, steps = io.StringIO(), CLOSING_STEPS + 3
    values = settings(train={"max_steps": steps, "global_batch": 1, "reference_micro_batch": 1})
    summary = run(check_config(values), Console(file=said, width=1000)).summary
    losses = [row["loss"] for row in read_metrics(tmp_path / "run")]
    assert len(losses) == steps
    assert summary["closing_loss"] == pytest.approx(sum(losses[3:]) / CLOSING_STEPS)
    assert (summary["closing_steps"], summary["final_loss"]) == (CLOSING_STEPS, losses[-1])
    assert f"complete: loss {summary['closing_loss']:.4f} (mean of the last {CLOSING_STEPS} steps), {steps} samples in" in said.getvalue()


@pytest.mark.parametrize("loss_norm", ["token", "llava"])
def test_packing_and_recompute_change_nothing_but_rounding(loss_norm, settings, tmp_path):
    losses, weights = [], []
    for name, change in {"one": {"micro_batch_tokens": 1}, "all": {"micro_batch_tokens": 10**6}, "again": {"recompute": "full"}}.items():
        train(settings("finetune", output_dir=str(tmp_path / name), train={"max_steps": 6, "loss_norm": loss_norm, **change}))
        losses.append([row["loss"] for row in read_metrics(tmp_path / name)])
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    for other, tensors in zip(losses[1:], weights[1:], strict=True):
        assert other == pytest.approx(losses[0], rel=1e-5)
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, weights[0][key], rtol=1e-3, atol=1e-5)


def test_a_finished_run_is_left_alone(settings, tmp_path):
    train(settings(train={"max_steps": 2}))
    written = (tmp_path / "run" / "mm_projector.safetensors").stat().st_mtime_ns
    assert train(settings(train={"max_steps": 2})).stopped_by is None
    assert (tmp_path / "run" / "mm_projector.safetensors").stat().st_mtime_ns == written


def test_another_training_in_the_same_output_dir_is_refused(settings):
    train(settings(train={"max_steps": 2}))
    with pytest.raises(UserError, match=r"output_dir: .*optim\.lr was 0\.01 and is now 0\.02.*another output_dir"):
        train(settings(optim={"lr": 2e-2}, train={"max_steps": 2}))


def test_changed_records_in_the_same_output_dir_are_refused(settings, world, tmp_path):
    records = json.loads((world / "captions.json").read_text())
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(records))
    train(settings(data={"records": str(path)}, train={"max_steps": 2}))
    path.write_text(json.dumps(records[1:]))
    with pytest.raises(UserError, match=r"data\.records: the prepared data is not the same"):
        train(settings(data={"records": str(path)}, train={"max_steps": 2}))


def test_finetune_without_a_projector_is_refused(settings):
    with pytest.raises(UserError, match=r"model\.projector: is missing.*mm_projector\.safetensors"):
        train(settings("finetune", model={"projector": None}))


def test_a_tokenizer_larger_than_the_embedding_is_refused(settings, world, tmp_path):
    small = tmp_path / "small"
    shutil.copytree(world / "llm", small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(UserError, match=r"model\.tokenizer: .* but model\.llm has embeddings for 100"):
        train(settings(model={"llm": str(small)}))


def test_samples_longer_than_the_attention_window_are_refused(settings, world, tmp_path):
    mistral = tmp_path / "mistral"
    shutil.copytree(world / "llm", mistral)
    config = json.loads((mistral / "config.json").read_text())
    (mistral / "config.json").write_text(json.dumps({**config, "model_type": "mistral", "sliding_window": 64}))
    with pytest.raises(UserError, match=r"data\.max_tokens: 2048 .* at most 64"):
        train(settings(model={"llm": str(mistral)}))


def test_identity_has_nothing_to_pretrain(settings):
    with pytest.raises(UserError, match=r"model\.projector_type: identity"):
        train(settings("pretrain", model={"projector_type": "identity"}))


def test_cuda_where_there_is_none_is_refused(settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"train\.device: 'cuda'"):
        train(settings(train={"device": "cuda"}))


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "two"), ("LOCAL_RANK", None)])
def test_variables_that_torchrun_has_not_set_are_named(name, value, settings, monkeypatch):
    for variable, given in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", name: value}.items():
        monkeypatch.setenv(variable, given) if given else monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match=f"{name}: is {value!r} in the environment; start several processes with torchrun"):
        train(settings())


def test_replicas_that_do_not_divide_the_processes_are_refused():
    with pytest.raises(UserError, match=r"parallel\.replicas: 3 does not divide the 4 processes; write a divisor of 4"):
        check_replicas(ParallelConfig(replicas=3), 4)


def test_a_second_run_in_the_same_output_dir_is_refused(settings, tmp_path):
    hold = (
        "import time; from pathlib import Path; from fastllava.train.state.resume import locked\n"
        f"with locked(Path({str(tmp_path / 'run')!r})): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another run is writing"):
            train(settings())
        other.kill()
    assert train(settings(train={"max_steps": 1})).summary["status"] == "complete", "a killed run holds nothing"


def test_an_image_that_vanishes_before_a_run_is_counted_and_its_return_noticed(settings, world, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for path in (world / "images").iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    values = settings(data={"images": str(images), "shuffle": False, "workers": 1})
    from fastllava.train.dataset import prepare_data

    prepare_data(check_config(values), lambda _: None)
    (images / "9.png").unlink()
    with pytest.raises(UserError, match=r"max_quarantined_share: 1 of 24 records .*image_not_found 1"):
        train(values)
    assert not read_metrics(tmp_path / "run")
    (images / "9.png").write_bytes((world / "images" / "9.png").read_bytes())
    train(values)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(6))


def test_a_step_that_is_not_finite_moves_nothing_and_names_its_samples(settings, tmp_path, monkeypatch):
    from fastllava.model.llava import Llava

    calls = []
    honest = Llava.forward

    def forward(self, batch):
        calls.append(1)
        return honest(self, batch) * (float("nan") if len(calls) == 6 else 1.0)

    values = settings(train={"micro_batch_tokens": 10**6, "checkpoint_steps": 100})
    monkeypatch.setattr(Llava, "forward", forward)
    with pytest.raises(UserError, match=r"step 5: loss nan.*optim\.lr") as error:
        train(values)
    assert len(str(error.value).splitlines()) == 1
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(5))
    noted = json.loads((tmp_path / "run" / "non_finite_step_5.json").read_text())
    assert len(noted["samples"]) == 4
    assert all(name.startswith("cap") for name in noted["samples"])
    monkeypatch.setattr(Llava, "forward", honest)
    train(values)
    resumed = load_file(tmp_path / "run" / "mm_projector.safetensors")
    train({**values, "output_dir": str(tmp_path / "whole")})
    unbroken = load_file(tmp_path / "whole" / "mm_projector.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items()), "the state kept was the one before the bad step"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_by_signal_saves_and_goes_on(number, code, settings, tmp_path):
    values = settings("finetune", data={"workers": 2}, train={"epochs": 200})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    command = [FASTLLAVA, "train", path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for_steps(tmp_path / "run", 5, process)
    # To its data workers too, as terminals, torchrun and schedulers do.
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert "the same command goes on" in out
    rows = read_metrics(tmp_path / "run")
    assert checkpoint.newest(tmp_path / "run").step == len(rows)
    assert json.loads((tmp_path / "run" / "run_summary.json").read_text())["status"] == "interrupted"


@pytest.mark.parametrize("seconds", [0.3, 1.2])
def test_ctrl_c_while_it_starts_leaves_nothing_and_no_traceback(seconds, settings, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings()))
    process = subprocess.Popen([FASTLLAVA, "train", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode in (130, -signal.SIGINT), err
    assert "Traceback" not in err


def wait_for_steps(output_dir, count, process):
    for _ in range(600):
        if len(read_metrics(output_dir)) >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("no steps within a minute")


def test_the_step_never_waits_for_the_device(settings, monkeypatch):
    """On a CPU train_step calls no `.item()`, `.tolist()` or nonzero but in the reference of attention, which says so."""
    import fastllava.train.loop as module

    waits = []
    inside = []
    honest = module.train_step

    def watched(*args):
        inside.append(1)
        try:
            return honest(*args)
        finally:
            inside.pop()

    for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__"):
        original = getattr(torch.Tensor, name)

        def spy(tensor, *args, _original=original, _name=name, **kwargs):
            caller = sys._getframe(1).f_code.co_filename
            if inside and "attention" not in caller and "/torch/" not in caller:
                waits.append((_name, caller))
            return _original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    monkeypatch.setattr(module, "train_step", watched)
    train(settings("finetune", optim={"max_grad_norm": 1.0}, train={"max_steps": 2}))
    assert waits == []


@pytest.mark.parametrize("content", ["", "[1]", '{"status": "complete"}', "{", "\xff"])
def test_a_summary_that_no_run_wrote_is_named(content, settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run_summary.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"run_summary\.json: is not a summary"):
        train(settings())


ROW = {"step": 0, "loss": 1, "lr": 1, "samples": 1, "tokens": 1, "supervised_tokens": 1, "step_seconds": 1, "data_wait_seconds": 0}
NO_ROWS = [b"[1]", b"{}", b"\xff", b'{"step": 1, "los', b"", b'{"step": 1}', json.dumps({**ROW, "loss": "x"}).encode(), b"[" * 100_000]


@pytest.mark.parametrize("line", NO_ROWS)
def test_a_damaged_line_of_metrics_is_left_out(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    with path.open("ab") as file:
        file.write(line + b"\n" + json.dumps({**ROW, "step": 2}).encode() + b'\n{"step": 3, "lo')
    assert read_metrics(tmp_path) == [ROW, {**ROW, "step": 2}]


def test_damaged_metrics_never_block_a_resume_and_are_set_aside(settings, tmp_path, capsys):
    values = settings(train={"max_steps": 4, "checkpoint_steps": 2})
    train(values)
    (tmp_path / "run" / "run_summary.json").unlink()
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], b"\xff\x00" * 10, *lines[2:]]) + b"\n")
    summary = run(check_config(values), Console(width=500)).summary
    assert "metrics.jsonl: 1 line is no row: moved to metrics.damaged" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.damaged").read_bytes() == b"\xff\x00" * 10 + b"\n"
    assert summary["status"] == "complete"


def killing_itself(times, tmp_path, honest):
    """A load_image that kills its process at 9.png, so many times."""
    deaths = tmp_path / "deaths"

    def load_image(path, *args):
        if path.name == "9.png" and (before := deaths.read_text() if deaths.exists() else "") != times * "x":
            deaths.write_text(before + "x")
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(path, *args)

    return load_image


def test_a_data_worker_that_is_killed_is_started_again_and_nothing_changes(settings, tmp_path, monkeypatch, capsys):
    import fastllava.data.loader as module

    values = settings(data={"workers": 2})
    train({**values, "output_dir": str(tmp_path / "whole")})
    monkeypatch.setattr(module, "load_image", killing_itself(1, tmp_path, module.load_image))
    assert run(check_config(values), Console(width=200)).summary["status"] == "complete"
    assert "data.workers: a worker was killed by SIGKILL while it read record cap9; started again" in capsys.readouterr().out
    kept = ("step", "loss", "grad_norm")
    rows = [[[row[key] for key in kept] for row in read_metrics(tmp_path / name)] for name in ("run", "whole")]
    assert rows[0] == rows[1] != []


def test_a_data_worker_that_hangs_before_it_begins_is_replaced_and_nothing_changes(settings, tmp_path, monkeypatch, capsys):
    from fastllava.data import feed

    honest = feed.begin_worker

    def begin_worker(parent):
        if not (tmp_path / "hung").exists():
            (tmp_path / "hung").touch()
            time.sleep(3600)
        honest(parent)

    values = settings(data={"workers": 2})
    train({**values, "output_dir": str(tmp_path / "whole")})
    monkeypatch.setattr(feed, "_BEGIN_SECONDS", 1.0)
    monkeypatch.setattr(feed, "begin_worker", begin_worker)
    assert run(check_config(values), Console(width=200)).summary["status"] == "complete"
    assert capsys.readouterr().out.count("data.workers: a worker was hanging ever since it was started") == 1
    kept = ("step", "loss", "grad_norm")
    rows = [[[row[key] for key in kept] for row in read_metrics(tmp_path / name)] for name in ("run", "whole")]
    assert rows[0] == rows[1] != []
    weights = [(tmp_path / name / "mm_projector.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]


def test_a_picture_that_kills_every_worker_is_named_and_nothing_is_lost(settings, tmp_path, monkeypatch):
    import fastllava.data.loader as module

    honest = module.load_image
    values = settings(data={"workers": 1, "shuffle": False})
    monkeypatch.setattr(module, "load_image", killing_itself(3, tmp_path, honest))
    with pytest.raises(UserError, match=r"data\.workers: a worker was killed by SIGKILL while it read record cap9, for the third time"):
        train(values)
    assert multiprocessing.active_children() == []
    assert train(values).summary["status"] == "complete"
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(6))


def test_a_batch_that_finds_no_room_in_shared_memory_names_the_remedy_and_that_works(settings, monkeypatch):
    def no_room(_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)")

    monkeypatch.setattr(Batch, "share_memory", no_room)
    named = r"data\.workers: a batch of \d.* finds no space in shared memory .*make /dev/shm larger .*or data\.workers=0"
    with pytest.raises(UserError, match=named):
        train(settings(data={"workers": 1}))
    assert multiprocessing.active_children() == []
    assert train(settings(data={"workers": 0})).summary["status"] == "complete"


def test_paths_that_are_masked_in_what_is_written_are_found_by_export_and_by_a_resume(settings, world, tmp_path):
    owned = tmp_path / "me:hunter2secret@mirror"
    for name in ("llm", "clip", "images"):
        shutil.copytree(world / name, owned / name)
    values = settings("finetune", model={"llm": str(owned / "llm"), "vision_tower": str(owned / "clip")}, train={"checkpoint_steps": 2})
    values = {**values, "data": {**values["data"], "images": str(owned / "images")}, "output_dir": str(owned / "run")}
    values["train"]["max_steps"] = 4
    train(values)
    # The result's config.json names the tower, as whoever loads it needs that.
    written = [path.read_bytes() for path in (owned / "run").rglob("*") if path.is_file() and path.name != "config.json"]
    assert not any(b"hunter2secret" in text for text in written)
    export(owned / "run" / "checkpoint-2", "llava", tmp_path / "exported")
    (owned / "run" / "run_summary.json").unlink()
    shutil.rmtree(owned / "run" / "checkpoint-4")
    assert train(values).summary["steps"] == 4
    (owned / "llm").rename(owned / "elsewhere")
    with pytest.raises(
        UserError, match=r"model\.llm: a part of it was masked .* 0 paths here match .*\*\*\*@mirror/llm; make that very path"
    ):
        export(owned / "run" / "checkpoint-2", "llava", tmp_path / "again")
    (tmp_path / "***@mirror").mkdir()
    (tmp_path / "***@mirror" / "llm").symlink_to(owned / "elsewhere")
    export(owned / "run" / "checkpoint-2", "llava", tmp_path / "again")


def test_too_little_gpu_memory_names_the_keys_and_keeps_the_state(settings, tmp_path, monkeypatch):
    import fastllava.train.loop as module

    honest, calls = module.train_step, []

    def runs_out(*args):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(*args)

    monkeypatch.setattr(module, "train_step", runs_out)
    with pytest.raises(UserError, match=r"tokens: 150 tokens.*write train\.micro_batch_tokens=75, or train\.recompute=norms"):
        train(settings())
    assert checkpoint.newest(tmp_path / "run").step == 3


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), OSError(5, "Input/output error")])
def test_a_state_that_has_moved_half_is_never_kept(error, settings, tmp_path, monkeypatch, capsys):
    import fastllava.train.loop as module

    honest, calls = module.train_step, []

    def moves_half(*args):
        calls.append(1)
        if len(calls) == 4:
            optimizer = args[1]

            def step():
                with torch.no_grad():
                    optimizer.param_groups[0]["params"][0].add_(1.0)
                raise error

            optimizer.step = step
        return honest(*args)

    values = settings(train={"checkpoint_steps": 2, "max_steps": 6})
    monkeypatch.setattr(module, "train_step", moves_half)
    with pytest.raises(UserError):
        run(check_config(values), Console(width=500))
    assert "stopped within step 3: that is no state to keep; the same command goes on from checkpoint-2" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.setattr(module, "train_step", honest)
    train(values)
    train({**values, "output_dir": str(tmp_path / "whole")})
    ours, theirs = (load_file(tmp_path / name / "mm_projector.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_checkpoint_that_finds_no_memory_is_said_and_the_training_goes_on(settings, tmp_path, monkeypatch, capsys):
    honest, calls = shards.FileSystemWriter.write_data, []

    def runs_out(*args):
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        return honest(*args)

    monkeypatch.setattr(shards.FileSystemWriter, "write_data", runs_out)
    assert run(check_config(settings(train={"max_steps": 4, "checkpoint_steps": 2})), Console(width=500)).summary["status"] == "complete"
    words = r"checkpoint before step 2 could not be written \(.*not enough memory on the host.*data\.workers\).*training goes on"
    assert re.search(words, capsys.readouterr().out)
    assert checkpoint.newest(tmp_path / "run").step == 4


def test_a_save_that_finds_no_memory_ends_the_run_in_one_line(settings, tmp_path, monkeypatch):
    def runs_out(*_):
        raise MemoryError

    monkeypatch.setattr(checkpoint, "_complete", runs_out)
    with pytest.raises(UserError, match=r"output_dir: .* could not be written for want of memory; free memory on the host"):
        train(settings(train={"max_steps": 4, "checkpoint_steps": 2}))


def test_there_is_no_checkpoint_before_the_first_step(settings, tmp_path, monkeypatch):
    import fastllava.train.loop as module

    def runs_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "train_step", runs_out)
    with pytest.raises(UserError, match=r"train\.micro_batch_tokens"):
        train(settings(train={"checkpoint_steps": 1}))
    assert not list((tmp_path / "run").glob("*checkpoint*"))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ImportError("no Qt"), ValueError("'Qt4Agg' is no\nbackend")])
def test_a_plot_that_cannot_be_drawn_is_one_line_after_the_result(error, settings, tmp_path, monkeypatch, capsys):
    import fastllava.train.result as module

    def fails(*_):
        assert json.loads((tmp_path / "run" / "run_summary.json").read_text())["status"] == "complete"
        raise error

    monkeypatch.setattr(module, "plot_loss", fails)
    assert run(check_config(settings(train={"max_steps": 2})), Console(width=200)).summary["status"] == "complete"
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"loss.png could not be drawn ({type(error).__name__}: {' '.join(str(error).split())}); all else is there"


def test_a_single_step_of_warm_up_is_said(settings, capsys):
    run(check_config(settings(train={"max_steps": 1})), Console(width=200))
    assert "runs at lr 0" in capsys.readouterr().out


def test_a_metrics_file_that_cannot_be_written_leaves_a_state_under_its_own_number(settings, tmp_path, monkeypatch):
    from fastllava.train.metrics.log import Metrics

    honest = Metrics.write

    def full(self, row):
        if row["step"] == 3:
            raise OSError(28, "No space left on device")
        honest(self, row)

    values = settings(train={"max_steps": 8})
    monkeypatch.setattr(Metrics, "write", full)
    with pytest.raises(UserError, match=r"output_dir: .*No space left"):
        train(values)
    monkeypatch.setattr(Metrics, "write", honest)
    train(values)
    train({**values, "output_dir": str(tmp_path / "whole")})
    resumed, unbroken = (load_file(tmp_path / name / "mm_projector.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items())
