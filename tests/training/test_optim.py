"""AdamW's groups, the schedule and the guard."""

import math

import pytest
import torch
from torch import nn

from fastllava.config import OptimConfig
from fastllava.optim import FiniteGuard, build_optimizer, clip_gradients, gradient_norm, lr_factor, set_lr

NAMES = [
    "projector.0.weight",
    "projector.0.bias",
    "llm.model.embed_tokens.weight",
    "llm.model.layers.0.input_layernorm.weight",
    "llm.lm_head.weight",
]


def named():
    return {name: nn.Parameter(torch.ones(2)) for name in NAMES}


def groups_by_name(optim):
    params = named()
    optimizer = build_optimizer(params.items(), optim)
    where = {id(p): (g["base_lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    return {name: where[id(p)] for name, p in params.items()}


def test_groups_are_the_originals():
    found = groups_by_name(OptimConfig(lr=2e-5, projector_lr=1e-4, weight_decay=0.1))
    assert found == {
        "projector.0.weight": (1e-4, 0.1),
        "projector.0.bias": (1e-4, 0.0),
        "llm.model.embed_tokens.weight": (2e-5, 0.1),
        "llm.model.layers.0.input_layernorm.weight": (2e-5, 0.0),
        "llm.lm_head.weight": (2e-5, 0.1),
    }


def test_a_projector_rate_of_zero_is_a_rate():
    assert groups_by_name(OptimConfig(lr=1.0, projector_lr=0.0))["projector.0.bias"] == (0.0, 0.0)


def test_frozen_parameters_have_no_group():
    params = named()
    params[NAMES[0]].requires_grad_(False)
    optimizer = build_optimizer(params.items(), OptimConfig(lr=1.0))
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(NAMES) - 1


def test_schedule_of_the_published_stage_2():
    # The original's log at step 22 of 5198: 2.8205e-06 (haotian-liu/LLaVA, issue 601).
    optim = OptimConfig(lr=2e-5)
    assert optim.lr * lr_factor(22, 5198, optim) == pytest.approx(2.8205e-06, rel=1e-4)
    assert lr_factor(0, 5198, optim) == 0.0
    assert lr_factor(156, 5198, optim) == 1.0
    assert lr_factor(5198, 5198, optim) == 0.0


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_schedules_half_way(schedule, middle):
    assert lr_factor(50, 100, OptimConfig(lr=1.0, warmup_ratio=0.0, schedule=schedule)) == pytest.approx(middle)


def test_set_lr_keeps_the_ratio_of_the_groups():
    optimizer = build_optimizer(named().items(), OptimConfig(lr=1.0, projector_lr=4.0))
    set_lr(optimizer, 0.25)
    assert sorted({g["lr"] for g in optimizer.param_groups}) == [0.25, 1.0]


def test_clipping_scales_to_the_norm_and_leaves_smaller_gradients_alone():
    params = list(named().values())
    for p in params:
        p.grad = torch.full((2,), 3.0)
    norm = gradient_norm(params)
    assert norm.item() == pytest.approx(math.sqrt(10 * 9))
    clip_gradients(params, norm, 1.0)
    assert gradient_norm(params).item() == pytest.approx(1.0, rel=1e-5)
    before = [p.grad.clone() for p in params]
    clip_gradients(params, gradient_norm(params), 5.0)
    assert all(torch.equal(p.grad, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_guard_keeps_weights_moments_and_counter_from_the_first_bad_step_on(bad):
    parameter = nn.Parameter(torch.ones(3))
    optimizer = build_optimizer({"projector.0.weight": parameter}.items(), OptimConfig(lr=0.1, weight_decay=0.1))
    guard = FiniteGuard(optimizer, torch.device("cpu"))

    def step(gradient, loss=1.0):
        parameter.grad = torch.full((3,), gradient)
        tripped = guard.watch(torch.tensor(loss), gradient_norm([parameter]))
        optimizer.step()
        return tripped.item()

    assert step(1.0) == 0.0
    held = parameter.detach().clone(), {k: v.clone() for k, v in optimizer.state[parameter].items()}
    assert step(bad) == 1.0
    assert step(1.0) == 1.0, "the flag never goes back"
    assert torch.equal(parameter, held[0])
    assert all(torch.equal(optimizer.state[parameter][k], v) for k, v in held[1].items())


def test_guard_trips_on_the_loss_alone():
    parameter = nn.Parameter(torch.ones(1))
    optimizer = build_optimizer({"projector.0.weight": parameter}.items(), OptimConfig(lr=0.1))
    guard = FiniteGuard(optimizer, torch.device("cpu"))
    assert guard.watch(torch.tensor(math.nan), torch.tensor(1.0)).item() == 1.0
