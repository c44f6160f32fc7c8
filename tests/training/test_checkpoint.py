"""Checkpoints on disk: whole or refused, never half."""

import json
import shutil

import pytest
import torch
from torch import nn

from fastllava.errors import UserError
from fastllava.optim import build_optimizer
from fastllava.train.state import checkpoint


def trained(config, seed=0):
    torch.manual_seed(seed)
    params = {"projector.0.weight": nn.Parameter(torch.randn(3, 4)), "projector.0.bias": nn.Parameter(torch.randn(3))}
    optimizer = build_optimizer(params.items(), config.optim)
    for _ in range(2):
        for parameter in params.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return params, optimizer


@pytest.fixture
def saved(config, tmp_path):
    params, optimizer = trained(config)
    for step in (3, 10):
        checkpoint.save(tmp_path, step, config, "digest", params, optimizer)
    return tmp_path


def test_round_trip_is_bitwise(config, saved):
    found = checkpoint.newest(saved)
    assert (found.step, found.prepared_digest, found.config) == (10, "digest", config)
    params, optimizer = trained(config)
    others, other_optimizer = trained(config, seed=1)
    checkpoint.restore(found, others, other_optimizer)
    for name, parameter in params.items():
        assert torch.equal(others[name], parameter)
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(other_optimizer.state[others[name]][key], value)
    read_config, weights = checkpoint.read_model(found.folder)
    assert read_config == config
    assert all(torch.equal(weights[name], parameter) for name, parameter in params.items())
    assert len(weights) == 2


FILES = ["tensors/__0_0.distcp", "tensors/.metadata", "state.json", "run_config.json"]


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found_and_the_older_checkpoint_used(name, saved):
    path = saved / "checkpoint-10" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    said = []
    assert checkpoint.newest(saved, said.append).step == 3
    assert name in said[0]
    assert "changed after it was written" in said[0]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_cut_file_is_found(name, saved):
    path = saved / "checkpoint-10" / name
    path.write_bytes(path.read_bytes()[:-1])
    assert checkpoint.newest(saved, lambda _: None).step == 3
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        checkpoint.verify(saved / "checkpoint-10")


def test_without_a_manifest_it_was_never_finished_and_does_not_count(saved):
    (saved / "checkpoint-10" / "manifest.json").unlink()
    shutil.copytree(saved / "checkpoint-10", saved / ".checkpoint-12.partial")
    assert checkpoint.newest(saved).step == 3
    checkpoint.keep_last(saved, 1)
    assert (saved / "checkpoint-3").exists(), "an unfinished one never pushes out the last good one"
    assert not (saved / ".checkpoint-12.partial").exists()


def test_all_damaged_is_an_error_and_no_fresh_start(saved):
    for step in (3, 10):
        (saved / f"checkpoint-{step}" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="every checkpoint"):
        checkpoint.newest(saved, lambda _: None)


def test_keep_last_keeps_the_newest(config, saved):
    params, optimizer = trained(config)
    checkpoint.save(saved, 200, config, "digest", params, optimizer)
    checkpoint.keep_last(saved, 2)
    assert sorted(path.name for path in saved.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-200"]


def test_another_models_checkpoint_is_refused(config, saved):
    wider = {"projector.0.weight": nn.Parameter(torch.zeros(5, 4)), "projector.0.bias": nn.Parameter(torch.zeros(5))}
    with pytest.raises(UserError, match="does not fit this model"):
        checkpoint.restore(checkpoint.newest(saved), wider, build_optimizer(wider.items(), config.optim))


def test_a_pickle_that_was_slipped_in_is_never_opened(saved):
    marker = saved / "marker"

    class Attack:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    import pickle

    (saved / "checkpoint-10" / "tensors" / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(UserError, match=r"tensors/\.metadata was"):
        checkpoint.read_model(saved / "checkpoint-10")
    assert not marker.exists()


def test_state_is_json(saved):
    state = json.loads((saved / "checkpoint-10" / "state.json").read_text())
    assert state["step"] == 10
