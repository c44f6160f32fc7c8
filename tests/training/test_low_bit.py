"""Moments in 8 bits and weights in bf16 alone: the arithmetic, the guard, checkpoints, and what a run makes of them."""

import itertools
import math
import os
import sys

import pytest
import torch
from rich.console import Console
from torch import nn

import fastllava.optim.optim
import fastllava.train.loop
from fastllava.config import OptimConfig, check_config
from fastllava.errors import UserError
from fastllava.model.compiled import whole_graph
from fastllava.optim import FiniteGuard, build_optimizer, gradient_norm, low_bit
from fastllava.optim.adamw import rounded
from fastllava.optim.low_bit import check_low_bit
from fastllava.train import run
from fastllava.train.metrics.log import read_metrics
from fastllava.train.state import checkpoint

CPU = torch.device("cpu")
LARGE, SMALL = (32, 160), (10, 3)
"""Shapes whose moments are quantised, and are not."""


@pytest.fixture(scope="module")
def torchao():
    return pytest.importorskip("torchao.optim", reason="torchao is not installed")


def named(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = {"llm.large.weight": LARGE, "llm.small.weight": SMALL, "llm.large.bias": (4096,)}
    return {name: nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in shapes.items()}


def gradients(steps, seed=1):
    """Gradients by step and parameter, whose size differs from row to row."""
    draws = torch.Generator().manual_seed(seed)
    shapes = [tuple(p.shape) for p in named().values()]
    return [
        [torch.randn(s, generator=draws) * torch.logspace(-4, 0, s[0]).view(-1, *[1] * (len(s) - 1)) for s in shapes] for _ in range(steps)
    ]


def trained(optim, steps=1, dtype=torch.float32, seed=0):
    params = named(dtype)
    optimizer = build_optimizer(params.items(), optim, seed)
    for found in gradients(steps):
        for parameter, gradient in zip(params.values(), found, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return params, optimizer


def everything(params, optimizer):
    return [tensor.detach().clone() for p in params.values() for tensor in (p, *optimizer.state[p].values())]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_one_step_is_adamws_but_for_the_rounding_of_the_moments(torchao):
    optim = OptimConfig(lr=0.1, weight_decay=0.1, state="8bit")
    exact, exact_optimizer = trained(OptimConfig(lr=0.1, weight_decay=0.1))
    coded, optimizer = trained(optim)
    eight_bit = low_bit._eight_bit()
    tables = dict(zip(("exp_avg", "exp_avg_sq"), eight_bit.tables(CPU), strict=True))
    quantised = 0
    for name, parameter in exact.items():
        torch.testing.assert_close(coded[name], parameter, rtol=1e-5, atol=1e-6)
        state, truth = optimizer.state[coded[name]], exact_optimizer.state[parameter]
        for moment, table in tables.items():
            if f"{moment}_codes" not in state:
                torch.testing.assert_close(state[moment], truth[moment])
                continue
            quantised += 1
            value = eight_bit.decode(state[f"{moment}_codes"], state[f"{moment}_scale"], table).view(-1, 256)
            wanted = truth[moment].view(-1, 256)
            # No nearer number than half the widest gap of the table, in units of the block's largest.
            bound = 0.501 * table.diff().max() * wanted.abs().amax(1, keepdim=True)
            assert (value - wanted).abs().le(bound).all()
            # Among small values the numbers lie as much closer as the values are smaller.
            share = ((value - wanted).abs() / wanted.abs())[wanted.abs() > 1e-3 * wanted.abs().amax(1, keepdim=True)]
            assert share.median() < 0.02
    assert quantised == 4, "both moments of the large weight and of the bias"


def test_steps_are_those_of_torchaos_adamw_8bit(torchao):
    from torchao.optim.adam import single_param_adam
    from torchao.optim.subclass_8bit import OptimState8bit

    optim = OptimConfig(lr=0.01, weight_decay=0.1, beta2=0.95, eps=1e-6, state="8bit")
    params, optimizer = trained(optim, steps=4)
    parameter = named()["llm.large.weight"]
    mean, square = (OptimState8bit.zeros(parameter.shape, signed, 256, CPU, torch.float32) for signed in (True, False))
    for step, (gradient, *_) in enumerate(gradients(4), 1):
        settings = torch.tensor(0.01), 0.9, 0.95, 0.1, 1e-6, True, False
        single_param_adam(parameter.detach(), gradient, torch.tensor(float(step)), mean, square, None, *settings)
    ours = params["llm.large.weight"]
    state = optimizer.state[ours]
    torch.testing.assert_close(ours, parameter, rtol=1e-6, atol=1e-7)
    for name, theirs in (("exp_avg", mean), ("exp_avg_sq", square)):
        torch.testing.assert_close(state[f"{name}_scale"], theirs.scale)
        # A value half way between two numbers may go to either.
        assert (state[f"{name}_codes"].int() - theirs.codes.int()).abs().max() <= 1
        assert (state[f"{name}_codes"] == theirs.codes).float().mean() > 0.999


def test_rounding_is_unbiased_and_to_a_neighbour():
    torch.manual_seed(0)
    exact = torch.cat((torch.randn(500), 1e-6 * torch.randn(500), torch.tensor([1.0 + 2**-8, -1.0 - 2**-12, 3.3895e38, 0.0])))
    draws, step = 4000, torch.tensor(7.0)
    found = torch.stack([rounded(exact, torch.tensor(salt, dtype=torch.int32), step).double() for salt in range(-draws // 2, draws // 2)])
    truncated = (exact.view(torch.int32) & -0x10000).view(torch.float32).double()
    away = ((exact.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32).double()
    assert ((found == truncated) | (found == away)).all()
    chance = ((exact.double() - truncated) / (away - truncated)).clamp(0, 1)
    deviation = (away - truncated).abs() * (chance * (1 - chance) / draws).sqrt()
    error = (found.mean(0) - exact.double()).abs()
    # Of a thousand values about three lie beyond 3 standard deviations, and none beyond 5.
    assert (error > 3 * deviation + 1e-300).float().mean() < 0.008
    assert (error <= 5 * deviation).all()
    assert equal(
        [rounded(torch.tensor([0.0, 1.5, -2.0]), torch.tensor(3, dtype=torch.int32), step)], [torch.tensor([0.0, 1.5, -2.0]).bfloat16()]
    )


def test_draws_are_independent_from_place_to_place_and_step_to_step():
    half = torch.full((20_000,), 1.0 + 2**-8)

    def ups(salt, step):
        return rounded(half, torch.tensor(salt, dtype=torch.int32), torch.tensor(float(step))).gt(1).double() - 0.5

    streams = [ups(salt, step) for salt, step in itertools.product((0, 1, 12345), (1, 2, 3))]
    for one, other in itertools.combinations(streams, 2):
        assert abs((one * other).mean().item()) < 4 * 0.25 / math.sqrt(len(half))
    for stream, lag in itertools.product(streams, (1, 2, 256, 4096)):
        assert abs((stream[lag:] * stream[:-lag]).mean().item()) < 4 * 0.25 / math.sqrt(len(half) - lag)
    assert equal([ups(1, 2)], [ups(1, 2)])


@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_bf16_weights_move_as_fp32_ones_do_on_average(state, request):
    if state == "8bit":
        request.getfixturevalue("torchao")
    moved = {}
    for master, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        weight = nn.Parameter(torch.ones(8192, dtype=dtype))
        optimizer = build_optimizer({"w": weight}.items(), OptimConfig(lr=2e-5, state=state, master=master))
        for _ in range(100):
            weight.grad = torch.ones(8192)
            optimizer.step()
        moved[master] = 1.0 - weight.detach().float().mean().item()
    assert moved["fp32"] == pytest.approx(2e-3, rel=2e-3)
    # A step is 2e-5 and bf16's numbers below 1 are 2 ** -8 apart: to the nearest, nothing would ever move. Half of them do move
    # by one of these, so the mean's standard deviation is below 2 ** -9 / sqrt(8192).
    assert moved["bf16"] == pytest.approx(moved["fp32"], abs=4 * 2**-9 / math.sqrt(8192))


def test_the_seed_decides_and_nothing_else():
    optim = OptimConfig(lr=1e-3, master="bf16")
    first, again, other = (trained(optim, 3, torch.bfloat16, seed) for seed in (5, 5, 6))
    torch.manual_seed(99)
    assert equal(everything(*first), everything(*again))
    assert not equal(everything(*first), everything(*other))


@pytest.mark.parametrize(("state", "master"), [("8bit", "fp32"), ("fp32", "bf16"), ("8bit", "bf16")])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_guard_keeps_every_bit_from_the_first_bad_step_on(state, master, bad, torchao):
    dtype = torch.float32 if master == "fp32" else torch.bfloat16
    params, optimizer = trained(OptimConfig(lr=0.1, weight_decay=0.1, state=state, master=master), 2, dtype)
    guard, held = FiniteGuard(optimizer, CPU), everything(params, optimizer)
    for value in (bad, 1.0):
        for parameter in params.values():
            parameter.grad = torch.full(parameter.shape, value)
        assert guard.watch(torch.tensor(1.0), gradient_norm(list(params.values()))).item() == 1.0
        optimizer.step()
        assert equal(everything(params, optimizer), held)


def test_pieces_of_a_parameter_are_its_whole(monkeypatch, torchao):
    optim = OptimConfig(lr=0.1, weight_decay=0.1, state="8bit")
    whole = everything(*trained(optim, 3))
    monkeypatch.setattr(low_bit, "_PIECE", 2048)
    assert equal(everything(*trained(optim, 3)), whole)


def test_as_one_graph_it_is_the_same(monkeypatch, torchao):
    found = []
    for graph in (low_bit.advance, whole_graph(low_bit.advance, "aot_eager")):
        monkeypatch.setattr(low_bit, "advance", graph)
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(LARGE).bfloat16())
        optim = OptimConfig(lr=0.01, weight_decay=0.1, state="8bit", master="bf16")
        optimizer = build_optimizer({"w": weight}.items(), optim)
        for gradient, *_ in gradients(2):
            weight.grad = gradient
            optimizer.step()
        found.append([weight.detach(), *optimizer.state[weight].values()])
    assert equal(*found)


def test_checkpoints_hold_it_bit_for_bit(tmp_path, torchao):
    values = {"stage": "finetune", "output_dir": "o", "model": {"llm": "l"}, "data": {"records": "r"}}
    config = check_config({**values, "optim": {"state": "8bit", "master": "bf16"}})
    params, optimizer = trained(config.optim, 3, torch.bfloat16)
    checkpoint.save(tmp_path, 3, config, "digest", params, optimizer)
    others, other = trained(config.optim, 1, torch.bfloat16)
    checkpoint.restore(checkpoint.newest(tmp_path), others, other)
    assert equal(everything(others, other), everything(params, optimizer))
    _, weights = checkpoint.read_model(tmp_path / "checkpoint-3")
    assert equal([weights[name] for name in params], list(params.values()))


def quiet():
    return Console(file=open(os.devnull, "w"))


LOW = {"state": "8bit", "master": "bf16"}


def test_a_run_that_died_goes_on_bit_for_bit_and_loses_little(settings, tmp_path, monkeypatch, torchao):
    train = {"precision": "bf16", "max_steps": 8, "checkpoint_steps": 3}
    values = settings("finetune", train=train, optim={"lr": 2e-3, **LOW})
    honest, calls = fastllava.train.loop.train_step, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return honest(*args)

    monkeypatch.setattr(fastllava.train.loop, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        run(check_config(values), quiet())
    monkeypatch.setattr(fastllava.train.loop, "train_step", honest)
    with pytest.raises(UserError, match=r"another training: optim\.state was 8bit and is now fp32"):
        run(check_config({**values, "optim": {"lr": 2e-3, "master": "bf16"}}), quiet())
    run(check_config(values), quiet())
    run(check_config({**values, "output_dir": str(tmp_path / "whole")}), quiet())
    run(check_config({**values, "output_dir": str(tmp_path / "fp32"), "optim": {"lr": 2e-3}}), quiet())
    broken, whole, fp32 = ([(row["loss"], row["grad_norm"]) for row in read_metrics(tmp_path / name)] for name in ("run", "whole", "fp32"))
    assert broken == whole
    assert (tmp_path / "run/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    means = [sum(loss for loss, _ in rows[-5:]) / 5 for rows in (whole, fp32)]
    assert means[1] < 0.99 * fp32[0][0], "it learns"
    assert abs(means[0] - means[1]) < 2e-3 * means[1]
    assert whole != fp32


def test_gradients_of_bf16_weights_add_up_in_fp32():
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    build_optimizer({"w": weight}.items(), OptimConfig(lr=1.0, master="bf16"))
    for _ in range(300):
        (weight * 1.0).sum().backward()
    assert weight.grad.dtype == torch.float32
    assert weight.grad.tolist() == [300.0] * 3, "in bf16 it would stop at 256"


@pytest.mark.parametrize(
    ("values", "said"),
    [({"state": "8bit"}, "optim.state: '8bit' is for a run of one process; 2"), ({"master": "bf16"}, "optim.master: 'bf16' is")],
)
def test_several_processes_are_refused(values, said):
    with pytest.raises(UserError, match=said):
        check_low_bit(OptimConfig(lr=1.0, **values), world=2)
    check_low_bit(OptimConfig(lr=1.0), world=2)


def test_a_missing_torchao_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "fastllava.optim.eight_bit", raising=False)
    monkeypatch.delattr(fastllava.optim, "eight_bit", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"optim\.state: '8bit' needs torchao.*pip install -e '\.\[torchao\]'"):
        check_low_bit(OptimConfig(lr=1.0, state="8bit"), world=1)
    check_low_bit(OptimConfig(lr=1.0, master="bf16"), world=1)


def test_bf16_weights_want_bf16_products():
    values = {"stage": "finetune", "output_dir": "o", "model": {"llm": "l"}, "data": {"records": "r"}}
    with pytest.raises(UserError, match=r"optim\.master: 'bf16' is less than train\.precision=fp32"):
        check_config({**values, "optim": {"master": "bf16"}, "train": {"precision": "fp32"}})


def test_a_run_in_fp8_says_so_and_goes_on_in_fp8_alone(settings, tmp_path, torchao, capsys):
    values = settings("pretrain", train={"precision": "bf16", "fp8": "rowwise", "max_steps": 2, "checkpoint_steps": 1})
    run(check_config(values), Console(width=300))
    said = capsys.readouterr().out
    assert "pretrain on cpu, bf16, decoder's products in fp8 (rowwise, emulated): trains projector" in said
    (tmp_path / "run" / "run_summary.json").unlink()
    values["train"]["fp8"] = "off"
    with pytest.raises(UserError, match=r"another training: train\.fp8 was rowwise and is now off"):
        run(check_config(values), quiet())
