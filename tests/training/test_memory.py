"""Out of memory is one line that names what helps there, and nothing that the config leaves no room for."""

import errno

import pytest
import torch
from rich.console import Console

from fastllava.config import Config, check_config
from fastllava.errors import UserError
from fastllava.model.llava import Llava
from fastllava.train import loop as train
from fastllava.train import memory

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 86.00 MiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


def of_a_step(config: Config, world: int = 1, longest: int = 100) -> str:
    with pytest.raises(UserError) as told, memory.within_a_step(config, world, longest):
        raise ERRORS[0]
    return str(told.value)


def set_up(config: Config, world: int = 1) -> str:
    with pytest.raises(UserError) as told, memory.while_setting_up(config, world):
        raise ERRORS[0]
    return str(told.value)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_kind_of_it_is_known_and_others_pass(error, settings):
    config = check_config(settings())
    with pytest.raises(UserError, match=r"output_dir: .* could not be written for want of memory"), memory.while_writing(config):
        raise error
    with pytest.raises(RuntimeError, match="shapes"), memory.while_writing(config):
        raise RuntimeError("shapes differ")


def test_a_step_is_told_a_smaller_budget_only_above_the_longest_sample(settings):
    config = check_config(settings(train={"micro_batch_tokens": 150}))
    assert "train.micro_batch_tokens=100, or train.recompute=norms" in of_a_step(config)
    assert "train.micro_batch_tokens=" not in of_a_step(config, longest=150)


@pytest.mark.parametrize(("now", "next_"), [("none", "norms"), ("norms", "selective"), ("selective", "full"), ("full", None)])
def test_a_step_is_told_the_next_stronger_recompute_only(now, next_, settings):
    said = of_a_step(check_config(settings(train={"recompute": now, "micro_batch_tokens": 150})))
    assert (f"write train.micro_batch_tokens=100, or train.recompute={next_}" in said) == (next_ is not None)
    assert said.count("recompute") == (2 if next_ else 1)


def test_a_step_that_nothing_makes_smaller_is_told_of_weights(settings):
    config = check_config(settings("finetune", train={"recompute": "full", "micro_batch_tokens": 1, "precision": "bf16"}))
    said = of_a_step(config)
    assert "recompute=full" not in said
    assert "optim.state=8bit or optim.master=bf16" in said
    assert "parallel.reshard=true" in of_a_step(check_config(settings(parallel={"reshard": False})), world=2)


def test_what_does_not_fit_at_all_is_told_levers_that_are_open(settings):
    assert "optim.state=8bit in a new output_dir" in set_up(check_config(settings("finetune")))
    bf16 = {"train": {"precision": "bf16"}, "optim": {"state": "8bit", "master": "bf16"}}
    said = set_up(check_config(settings("finetune", **bf16)))
    assert "8bit" not in said
    assert "with optim.state=fp32 and optim.master=fp32" in said
    shared = set_up(check_config(settings("finetune", train={"precision": "bf16"})), world=2)
    assert "optim.state" not in shared
    assert "nproc-per-node" in shared
    assert "parallel.frozen=shard" in set_up(check_config(settings("pretrain")))


def test_a_run_that_cannot_place_its_weights_is_one_line(settings, monkeypatch):
    def to(*_, **__):
        raise ERRORS[0]

    monkeypatch.setattr(Llava, "to", to)
    with pytest.raises(UserError, match=r"model\.llm: weights.*do not fit into memory \(CUDA out of memory.*fastllava plan"):
        train.run(check_config(settings("finetune")), Console(quiet=True))
