"""The decoder's last layer for supervised rows only: the loss and the gradients of all rows, and less work."""

from dataclasses import replace

import pytest
import torch

from fastllava.model.build import rebuilt
from fastllava.model.execution import Execution
from fastllava.model.llama import MLP
from fastllava.model.ops import choose_ops
from fastllava.model.weights import load_llava

CPU = torch.device("cpu")
# What a GPU takes, where it can run without one; each falls back on plain PyTorch for tensors on a CPU.
GPU_OPS = {"attention": "varlen", "rms_norm": "triton", "add_rms_norm": "triton", "rope": "triton", "swiglu": "triton"}


def loss_and_gradients(model, batch, last_layer):
    model = rebuilt(model, replace(model.execution, last_layer=last_layer))
    loss = model(batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def model_of(tiny, ops, dtype):
    model = load_llava(tiny.config(projector="fresh"), Execution(ops, dtype), 5)
    model.tower.requires_grad_(False)
    return model


def gpu_ops():
    from fastllava.model.ops import Ops

    return Ops(choose_ops({}, CPU, torch.float32).chosen | GPU_OPS)


# Supervised rows lie apart (several turns), lead their samples, are all in one sample, are a single one, or are none.
@pytest.mark.parametrize("group", [[2], [0, 1, 2, 3, 4, 5], [5, 3], [4], [5], [1, 5]])
@pytest.mark.parametrize("ops", ["reference", "gpu"])
def test_loss_and_every_gradient_are_those_of_all_rows(tiny, group, ops):
    model = model_of(tiny, gpu_ops() if ops == "gpu" else tiny.ops, torch.float64)
    batch = tiny.pack([tiny.mixed()[i] for i in group], weight=0.1)
    expected, found = loss_and_gradients(model, batch, "all"), loss_and_gradients(model, batch, "supervised")
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=0)
    assert found[1].keys() == expected[1].keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-11 * gradient.norm(), name
    if len(batch.targets):
        assert all(gradient.norm() > 0 for name, gradient in found[1].items() if "llm" in name)


def test_queries_and_keys_that_are_normed_are_those_of_all_rows(tiny, tmp_path):
    config = {**tiny.LLM, "model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 2}
    folder = tiny.write_folder(tmp_path, config, tiny.llm_tensors(config))
    model = load_llava(tiny.config(llm=folder, projector="fresh"), Execution(tiny.ops, torch.float64), 5)
    model.tower.requires_grad_(False)
    batch = tiny.pack(tiny.mixed(), weight=0.1)
    expected, found = loss_and_gradients(model, batch, "all"), loss_and_gradients(model, batch, "supervised")
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=0)
    assert "llm.model.layers.1.self_attn.q_norm.weight" in found[1]
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-11 * gradient.norm(), name


def test_every_row_supervised(tiny):
    model = model_of(tiny, tiny.ops, torch.float64)
    batch = tiny.pack(tiny.mixed())
    rows = len(batch.token_ids)
    batch = replace(
        batch,
        supervised_rows=torch.arange(rows, dtype=torch.int32),
        targets=torch.arange(rows) % 90,
        weights=torch.linspace(0.5, 1.0, rows),
    )
    expected, found = loss_and_gradients(model, batch, "all"), loss_and_gradients(model, batch, "supervised")
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=0)
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-11 * gradient.norm(), name


def test_only_the_last_layer_s_mlp_sees_fewer_rows(tiny):
    model = model_of(tiny, tiny.ops, torch.float32)
    batch = tiny.pack(tiny.mixed())
    rows, supervised = len(batch.token_ids), len(batch.targets)
    seen: list[int] = []
    everything = rebuilt(model, replace(model.execution, last_layer="all"))
    for module in (*model.llm.modules(), *everything.llm.modules()):
        if isinstance(module, MLP):
            module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    model(batch)
    everything(batch)
    model.logits(batch)
    assert seen == [rows, supervised] + [rows] * 4
    assert supervised < rows


def test_a_frozen_decoder_and_no_supervised_row_give_the_projector_zeros(tiny):
    model = model_of(tiny, gpu_ops(), torch.float32)
    model.llm.requires_grad_(False)
    loss, gradients = loss_and_gradients(model, tiny.pack([tiny.mixed()[5]]), "supervised")
    assert loss == 0
    assert {name.split(".")[0] for name in gradients} == {"projector"}
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients.values())
