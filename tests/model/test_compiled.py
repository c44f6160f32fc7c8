"""torch.compile of layers and of the whole forward: the eager losses and gradients, in few graphs, all of them whole."""

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastllava.config import Compile, LoraConfig, Recompute
from fastllava.errors import UserError
from fastllava.model.compiled import GRAPHS, check_compiler
from fastllava.model.execution import Execution
from fastllava.model.lora import drawn
from fastllava.model.ops import choose_ops
from fastllava.model.weights import load_llava
from fastllava.train.stages import trained_parts

CPU = torch.device("cpu")


def model_of(tiny, lora=None, **execution):
    ops = choose_ops({}, CPU, torch.float32, compiled=True)
    model = load_llava(tiny.config(projector="fresh"), Execution(ops, torch.float32, **execution), 5, lora)
    model.requires_grad_(False)
    for part in trained_parts(model, "finetune"):
        part.requires_grad_(True)
    return model


def losses_and_gradients(model, batches):
    model.zero_grad(set_to_none=True)
    losses = [model(batch) for batch in batches]
    for loss in losses:
        loss.backward()
    return [loss.detach() for loss in losses], {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Samples of `mixed_samples`: with 0, 1 and several images, supervised rows and samples; twelve different micro-batches.
GROUPS = [[2, 3], [0, 2], [0, 1, 3], [5], [1], [1, 5], [0], [4, 2, 3], [3], [2], [0, 1, 2, 3, 4, 5], [2, 4, 5]]


@pytest.mark.parametrize(
    ("mode", "recompute", "groups"),
    [
        ("layer", "none", 12),
        pytest.param("step", "none", 12, marks=pytest.mark.exhaustive),
        ("layer", "full", 2),
        pytest.param("step", "selective", 1, marks=pytest.mark.exhaustive),
    ],
)
def test_few_graphs_give_the_eager_gradients(tiny, mode: Compile, recompute: Recompute, groups: int) -> None:
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    samples = tiny.mixed()
    batches = [tiny.pack([samples[i] for i in group], weight=0.1) for group in GROUPS[:groups]]
    eager, compiled = model_of(tiny, recompute=recompute), model_of(tiny, recompute=recompute, compile=mode, backend=graphs)
    expected, found = losses_and_gradients(eager, batches), losses_and_gradients(compiled, batches)
    torch.testing.assert_close(torch.stack(found[0]), torch.stack(expected[0]), rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert 1 <= graphs.frame_count <= GRAPHS[mode]


@pytest.mark.parametrize(
    ("mode", "recompute"),
    [("layer", "none"), *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in (("layer", "selective"), ("step", "full")))],
)
def test_all_layers_with_adapters_share_their_graphs(tiny, mode: Compile, recompute: Recompute) -> None:
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    samples, lora = tiny.mixed(), LoraConfig(rank=2, dropout=0.25)
    batches = [tiny.pack([samples[i] for i in group], weight=0.1) for group in GROUPS[:3]]
    batches = [dataclasses.replace(batch, row_keys=7 * torch.arange(len(batch.token_ids))) for batch in batches]
    models = [model_of(tiny, lora, recompute=recompute), model_of(tiny, lora, recompute=recompute, compile=mode, backend=graphs)]
    for model in models:
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.weight"):
                parameter.data = drawn(name.replace("lora_B", "lora_A"), parameter.shape, 1)
    expected, found = (losses_and_gradients(model, batches) for model in models)
    torch.testing.assert_close(torch.stack(found[0]), torch.stack(expected[0]), rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() + gradient.norm() > 0
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert 1 <= graphs.frame_count <= GRAPHS[mode]


def test_off_compiles_nothing(tiny) -> None:
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    model_of(tiny, backend=graphs)(tiny.pack(tiny.mixed()))
    assert graphs.frame_count == 0


def test_an_op_that_cannot_be_traced_is_refused_by_name_and_passed_over_by_auto() -> None:
    assert choose_ops({}, CPU, torch.float32, compiled=True).chosen["attention"] == "sdpa"
    with pytest.raises(Exception, match=r"kernels\.attention: 'reference' cannot run here") as caught:
        choose_ops({"attention": "reference"}, CPU, torch.float32, compiled=True)
    assert "\n" not in str(caught.value)


def test_a_missing_compiler_is_one_line() -> None:
    check_compiler("layer", CPU)
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")}),
        pytest.raises(UserError, match=r"train\.compile: 'step' cannot run here .*write train\.compile=off") as caught,
    ):
        check_compiler("step", CPU)
    assert "\n" not in str(caught.value)
    check_compiler("off", torch.device("meta"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", ["layer", "step"])
def test_an_evaluation_has_graphs_of_its_own_and_leaves_those_of_the_training(tiny, mode: Compile) -> None:
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    samples = tiny.mixed()
    batches = [tiny.pack([samples[i] for i in group], weight=0.1) for group in GROUPS[2:6]]
    eager, compiled = model_of(tiny), model_of(tiny, compile=mode, backend=graphs)
    before = losses_and_gradients(compiled, batches)
    trained = graphs.frame_count
    found = []
    for model in (compiled, eager):
        model.eval()
        with torch.no_grad():
            losses = torch.stack([model(batch) for batch in batches])
            logits = torch.cat([model.logits(batch, batch.cu_seqlens[1:].long() - 1) for batch in batches])
        model.train()
        found.append((losses, logits))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert trained < graphs.frame_count <= 2 * GRAPHS[mode]
    total = graphs.frame_count
    again = losses_and_gradients(compiled, batches)
    assert graphs.frame_count == total
    assert all(torch.equal(one, other) for one, other in zip(before[0], again[0], strict=True))
    assert all(torch.equal(gradient, again[1][name]) for name, gradient in before[1].items())
