"""Loss spikes: found by the rule, flagged with their samples, left out when asked for, by all processes and after a resume alike."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from parallel_runs import MISHAPS, launch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from fastllava.config import OptimConfig, check_config
from fastllava.model.llava import Llava
from fastllava.optim import FiniteGuard, build_optimizer
from fastllava.optim.spikes import FEWEST, WINDOW, Recent, checked
from fastllava.train import loop as train
from fastllava.train.metrics.log import read_metrics
from fastllava.train.state import checkpoint

CPU = torch.device("cpu")
LAST = 19


def judged(losses: list[float], norms: list[float] | None = None) -> list[list[float]]:
    recent, found = Recent(CPU), []
    for pair in zip(losses, norms or losses, strict=True):
        far, recent.values = recent.judge(torch.tensor(pair))
        found.append(far.tolist())
    return found


def test_a_step_is_judged_by_mean_and_deviation_of_the_last_128():
    rng = np.random.default_rng(0)
    values = (1 + rng.random(300)).astype(np.float32)
    for i, (far, _) in enumerate(judged(values.tolist())):
        before = values[max(0, i - WINDOW) : i].astype(np.float64)
        expected = (values[i] - before.mean()) / before.std(ddof=1) if i >= FEWEST else 0.0
        assert far == pytest.approx(expected, abs=1e-4)


def test_loss_and_norm_are_judged_apart():
    calm = [1.0 + i % 3 / 10 for i in range(20)]
    assert judged([*calm, 9.0], [*calm, 1.1])[-1] == [pytest.approx(90, rel=0.3), pytest.approx(0, abs=1)]
    assert judged([*calm, 1.1], [*calm, 9.0])[-1][1] > 50


def test_a_spike_does_not_hide_the_next_and_what_stays_is_taken_for_normal():
    calm = [1.0 + i % 3 / 10 for i in range(140)]
    spikes = [far > 6 for far, _ in judged([*calm, 10.0, 1.0, 10.0, *calm[:20]])]
    assert [i for i, spike in enumerate(spikes) if spike] == [140, 142]
    risen = [far > 6 for far, _ in judged([*calm, *[10.0] * 40])]
    assert risen[140]
    assert not any(risen[165:])


def test_steps_that_are_all_alike_block_nothing_after_them():
    assert not any(far > 6 for far, _ in judged([1.0] * 40 + [1.03] * 20)), "3 % are no spike"
    # Steps without a supervised token, and then some with.
    found = [far > 6 for far, _ in judged([0.0] * 40 + [2.0] * 20)]
    assert not found[40]
    assert not any(found[50:])


def a_step(optimizer: torch.optim.Optimizer, guard: FiniteGuard, parameter: nn.Parameter, loss: float) -> None:
    parameter.grad = torch.full_like(parameter, 1.0, dtype=torch.float32)
    guard.watch(torch.tensor(loss), torch.tensor(1.0))
    optimizer.step()


@pytest.mark.parametrize("optim", [{}, {"state": "8bit", "master": "bf16"}])
@pytest.mark.parametrize("skip", [False, True])
def test_in_a_skipped_spike_neither_weights_nor_moments_nor_counters_move(optim: dict[str, Any], skip: bool):
    if optim:
        pytest.importorskip("torchao", reason="torchao is not installed")
    parameter = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16 if optim else torch.float32))
    optimizer = build_optimizer({"projector.0.weight": parameter}.items(), OptimConfig(lr=0.1, **optim))
    guard = FiniteGuard(optimizer, CPU, skip)
    for i in range(20):
        a_step(optimizer, guard, parameter, 1.0 + i % 3 / 10)
    before = [parameter.detach().clone(), *(value.clone() for value in optimizer.state[parameter].values())]
    a_step(optimizer, guard, parameter, 10.0)
    after = [parameter.detach(), *optimizer.state[parameter].values()]
    same = [torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert all(same) if skip else not any(same[:2])
    a_step(optimizer, guard, parameter, 1.0)
    assert not torch.equal(before[0], parameter), "the step after it moves"


def test_a_step_that_is_not_finite_or_fails_is_not_remembered():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = build_optimizer({"projector.0.weight": parameter}.items(), OptimConfig(lr=0.1))
    guard = FiniteGuard(optimizer, CPU)
    a_step(optimizer, guard, parameter, 1.0)
    guard.watch(torch.tensor(2.0), torch.tensor(2.0))  # and no step of the optimizer
    a_step(optimizer, guard, parameter, math.nan)
    a_step(optimizer, guard, parameter, 3.0)
    assert optimizer.recent.rows() == [[1.0, 1.0]]  # pyright: ignore[reportAttributeAccessIssue]


def test_what_is_remembered_comes_back_from_its_rows_exactly():
    recent, again = Recent(CPU), Recent(CPU)
    for i in range(150):
        _, recent.values = recent.judge(torch.tensor([1 / (i + 3), math.pi * i]))
    again.fill(json.loads(json.dumps(recent.rows())))
    assert torch.equal(recent.values, again.values)
    again.fill(())
    assert again.rows() == []


@pytest.mark.parametrize("rows", ["no", [1.0], [[1.0, 2.0, 3.0]], [[1.0, "two"]], [[1.0, 2.0]] * 200])
def test_rows_that_are_none_are_refused(rows: Any):
    with pytest.raises(ValueError, match=r"recent|two"):
        checked(rows)


def spiking(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """The `call`-th forward from here on gives a hundred times its loss."""
    honest, calls = Llava.forward, []

    def forward(model: Any, batch: Any) -> Any:
        calls.append(1)
        return honest(model, batch) * (100.0 if len(calls) == call else 1.0)

    monkeypatch.setattr(Llava, "forward", forward)


def test_a_spike_is_flagged_and_skipped_alike_after_a_resume(settings, tmp_path, monkeypatch, capsys):
    values = {"micro_batch_tokens": 10**6, "max_steps": LAST + 3, "checkpoint_steps": LAST - 2, "skip_spikes": True}
    with monkeypatch.context() as patch:
        spiking(patch, LAST + 1)
        unbroken = train.run(check_config(settings(output_dir=str(tmp_path / "unbroken"), train=values)), Console(width=500))
    said = capsys.readouterr().out
    [spike] = [row["spike"] for row in read_metrics(tmp_path / "unbroken") if "spike" in row]
    assert spike["skipped"]
    assert spike["loss_sigmas"] > 6
    assert len(spike["samples"]) == 4
    assert f"step {LAST}: spike: loss" in said
    assert spike["samples"][0] in said
    assert (unbroken.summary["spike_steps"], unbroken.summary["skipped_steps"]) == ([LAST], [LAST])

    honest, calls = train.train_step, []

    def breaks(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == LAST:
            raise KeyboardInterrupt
        return honest(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", breaks)
        with pytest.raises(KeyboardInterrupt):
            train.run(check_config(settings(train=values)), Console(quiet=True))
    with monkeypatch.context() as patch:
        spiking(patch, 3)  # of the steps that are done again from checkpoint 17 on
        resumed = train.run(check_config(settings(train=values)), Console(quiet=True))
    assert resumed.summary["skipped_steps"] == [LAST]
    one, other = (load_file(tmp_path / name / "mm_projector.safetensors") for name in ("run", "unbroken"))
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


def test_all_processes_skip_what_one_of_them_met(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(MISHAPS, "spike", lambda patch: spiking(patch, LAST + 1))
    steps = {"micro_batch_tokens": 10**6, "max_steps": LAST + 1, "checkpoint_steps": LAST, "skip_spikes": True}
    launch(2, [(settings("finetune", train=steps), "spike")], tmp_path / "said")
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "spike" in row] == [LAST]
    _, before = checkpoint.read_model(tmp_path / "run" / f"checkpoint-{LAST}")
    after = load_file(tmp_path / "run" / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], before["llm.lm_head.weight"])
    assert torch.equal(after["model.embed_tokens.weight"], before["llm.model.embed_tokens.weight"])
