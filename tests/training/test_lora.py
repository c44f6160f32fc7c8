"""Adapters in training: what trains, that dropout is the same however samples are laid out, and that a stopped run goes on bit for bit."""

import json
import math
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_runs import assert_near, left, trained
from parallel_runs import stop_after
from rich.console import Console
from small_world import small_config

from fastllava.config import TARGETS, LoraConfig, check_config
from fastllava.data.loader import steps
from fastllava.data.plan import Plan
from fastllava.data.prepared import PreparedSet
from fastllava.data.row_keys import row_keys
from fastllava.errors import UserError
from fastllava.model.execution import Execution
from fastllava.model.lora import adapters, drawn, is_adapter
from fastllava.model.ops import reference_ops
from fastllava.model.weights import load_llava, read_origin
from fastllava.optim import build_optimizer
from fastllava.train import run
from fastllava.train.metrics.flops import Accounting
from fastllava.train.stages import prepare_stage

LORA = {"rank": 4, "alpha": 12.0, "dropout": 0.25}
SMALL = {"max_steps": 4, "seed": 5}


def values_of(settings, out, **sections):
    changed = {"lora": LORA, "optim": {"lr": 1e-2, "projector_lr": 1e-3, "warmup_ratio": 0.0}, **sections}
    return settings("finetune", output_dir=str(out), **{**changed, "train": {**SMALL, **sections.get("train", {})}})


@pytest.fixture(scope="module")
def unbroken_run(world, tmp_path_factory) -> Path:
    """The folder of a run that nothing befell."""
    out = tmp_path_factory.mktemp("lora") / "unbroken"
    run(check_config(values_of(partial(small_config, world, out), out)), Console(quiet=True))
    return out


@pytest.fixture
def unbroken(unbroken_run):
    """Metrics and trained weights of a run that nothing befell."""
    return left(unbroken_run)


def test_adapters_and_projector_train_and_nothing_else(settings, tmp_path):
    config = check_config(values_of(settings, tmp_path, lora={**LORA, "targets": ["q_proj", "down_proj"]}))
    model = load_llava(config.model, Execution(reference_ops(), torch.float32), 5, config.lora)
    names = set(prepare_stage(model, config))
    llm = {name for name in names if name.startswith("llm.")}
    assert names - llm == {f"projector.{name}" for name, _ in model.projector.named_parameters()}
    places = (("self_attn.q_proj", "mlp.down_proj"), ("lora_A", "lora_B"))
    assert llm == {f"llm.model.layers.{i}.{place}.{part}.weight" for i in range(2) for place in places[0] for part in places[1]}
    assert len(list(adapters(model))) == 8


def test_four_groups_as_the_originals(settings, tmp_path):
    """llava_trainer.py: what decays, what does not, and the same of the projector; A and B decay."""
    config = check_config(values_of(settings, tmp_path, optim={"lr": 2e-4, "projector_lr": 2e-5, "weight_decay": 0.1}))
    model = load_llava(config.model, Execution(reference_ops(), torch.float32), 5, config.lora)
    trains = prepare_stage(model, config)
    groups = build_optimizer(trains.items(), config.optim).param_groups
    assert [len(group["params"]) for group in groups] == [2 * len(TARGETS) * 2, 0, 2, 2]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(2e-4, 0.1), (2e-4, 0.0), (2e-5, 0.1), (2e-5, 0.0)]


def test_new_adapters_are_pefts_and_change_nothing_yet(settings, tmp_path):
    config = check_config(values_of(settings, tmp_path))
    adapted = load_llava(config.model, Execution(reference_ops(), torch.float32), 5, config.lora)
    fewer = load_llava(config.model, Execution(reference_ops(), torch.float32), 5, config.lora.model_copy(update={"targets": ["k_proj"]}))
    found, same = dict(adapted.named_parameters()), dict(fewer.named_parameters())
    for name, parameter in found.items():
        if name.endswith("lora_A.weight"):
            bound = 1 / math.sqrt(parameter.shape[1])
            assert parameter.abs().max() <= bound
            assert float(parameter.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.3)
        if name.endswith("lora_B.weight"):
            assert not parameter.any()
    assert all(torch.equal(parameter, found[name]) for name, parameter in same.items())
    other = drawn("llm.model.layers.0.self_attn.k_proj.lora_A.weight", torch.Size((4, 32)), 6)
    assert not torch.equal(other, found["llm.model.layers.0.self_attn.k_proj.lora_A.weight"])


LAID_OUT = {
    "a sample a micro-batch": {"micro_batch_tokens": 1},
    "one micro-batch, computed again": {"micro_batch_tokens": 4096, "recompute": "full"},
    "all rows of the last layer": {"last_layer": "all", "recompute": "selective"},
    "norms computed again": {"recompute": "norms"},
}


_SLOW = {case: pytest.mark.exhaustive for case in LAID_OUT if "computed again" in case}


@pytest.mark.parametrize("case", [pytest.param(case, marks=_SLOW.get(case, ())) for case in LAID_OUT])
def test_dropout_is_the_same_however_samples_are_laid_out(settings, tmp_path, unbroken, case):
    assert_near(trained(values_of(settings, tmp_path / "run", train=LAID_OUT[case])), unbroken)


def test_dropout_is_the_same_in_every_implementation(settings, tmp_path, unbroken):
    assert_near(trained(values_of(settings, tmp_path / "run", kernels="reference")), unbroken)


def test_dropout_is_there_and_is_drawn_by_the_seed(settings, tmp_path, unbroken):
    """At the first step B is 0, so a mask cannot show."""
    whole = trained(values_of(settings, tmp_path / "whole", lora={**LORA, "dropout": 0.0}))
    assert whole[0][0]["loss"] == unbroken[0][0]["loss"]
    assert abs(whole[0][3]["loss"] / unbroken[0][3]["loss"] - 1) > 1e-4


@pytest.mark.parametrize("recompute", ["none", pytest.param("selective", marks=pytest.mark.exhaustive)])
def test_a_stopped_run_goes_on_bit_for_bit(settings, tmp_path, recompute):
    train = {"recompute": recompute}
    unbroken = trained(values_of(settings, tmp_path / "unbroken", train=train))
    values = values_of(settings, tmp_path / "run", train=train)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        assert run(check_config(values), Console(quiet=True)).stopped_by is signal.SIGTERM
    resumed = trained(values)
    exact = ("step", "loss", "grad_norm", "lr")
    assert [[row[key] for key in exact] for row in resumed[0]] == [[row[key] for key in exact] for row in unbroken[0]]
    assert all(torch.equal(resumed[1][name], tensor) for name, tensor in unbroken[1].items())


def test_what_a_row_draws_depends_on_seed_step_sample_and_place_alone():
    both = row_keys(7, 3, [10, 4], [5, 2])
    assert np.array_equal(np.concatenate([row_keys(7, 3, [10], [5]), row_keys(7, 3, [4], [2])]), both)
    assert np.array_equal(row_keys(7, 3, [10], [2]), both[:2])
    others = [row_keys(8, 3, [10], [5]), row_keys(7, 4, [10], [5]), row_keys(7, 3, [11], [5])]
    assert not any((both[:5] == other).any() for other in others)
    assert len(set(both.tolist())) == 7


def test_batches_carry_keys_only_where_something_is_drawn(unbroken_run):
    summary = json.loads((unbroken_run / "run_summary.json").read_text())
    prepared, config = PreparedSet.open(Path(summary["prepared"])), check_config(summary["config"])
    plan = Plan(prepared, config.data, config.train, Accounting.of(config).cost())
    spec = read_origin(config.model).spec
    step, batches = next(steps(plan, 0, prepared, spec, config.data, pin=False, seed=5))
    chosen = [int(step.samples[i]) for i in step.micro_batches[0][0]]
    lengths = np.diff(batches[0].cu_seqlens.numpy()).tolist()
    assert batches[0].row_keys is not None
    assert np.array_equal(batches[0].row_keys.numpy(), row_keys(5, 0, chosen, lengths))
    assert next(steps(plan, 0, prepared, spec, config.data, pin=False))[1][0].row_keys is None


def test_sixteen_random_bits_decide():
    assert LoraConfig(rank=1, dropout=0.05).dropped == 3277 / 65536
    assert not LoraConfig(rank=1, dropout=1e-6).draws


def test_an_mpt_is_refused_in_one_line(settings, world, tmp_path):
    from transformers import MptConfig, MptForCausalLM

    MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=400)).save_pretrained(tmp_path / "mpt")
    values = values_of(settings, tmp_path / "run", model={"llm": str(tmp_path / "mpt"), "tokenizer": str(world / "llm")})
    with pytest.raises(UserError, match=r"lora\.rank: model\.llm is an MPT, which gets no adapters here; leave the section lora out"):
        run(check_config(values), Console(quiet=True))


def test_names_of_adapters():
    assert is_adapter("llm.model.layers.0.self_attn.q_proj.lora_A.weight")
    assert not is_adapter("llm.model.layers.0.self_attn.q_proj.weight")
