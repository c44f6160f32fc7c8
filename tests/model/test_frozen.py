"""Stage pretrain's frozen decoder: backward passes through it and keeps nothing that only a weight's gradient would need."""

from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastllava.model import layers
from fastllava.model import linears as linear_layers
from fastllava.model.execution import Execution
from fastllava.model.layers import Linear, multiply
from fastllava.model.ops import Ops, choose_ops
from fastllava.model.weights import load_llava

# What a GPU takes, computed in plain PyTorch; bf16, as Triton would interpret fp32.
GPU_OPS = {"attention": "varlen", "rms_norm": "triton", "add_rms_norm": "triton", "rope": "triton", "swiglu": "triton"}


class Products(TorchDispatchMode):
    """The shapes (m, k, n) of the matrix products of backward."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm.out):
            a, b = args[-2:]
            self.shapes.append((a.shape[0], a.shape[1], b.shape[1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("ops", "last_layer", "trained"), list(product(["reference", "gpu"], ["supervised", "all"], [False, True])))
def test_no_input_of_a_frozen_linear_is_kept(tiny, monkeypatch, ops, last_layer, trained):
    chosen = choose_ops({}, torch.device("cpu"), torch.bfloat16).chosen
    execution = Execution(Ops(chosen | (GPU_OPS if ops == "gpu" else {})), torch.bfloat16, last_layer=last_layer)
    model = load_llava(tiny.config(projector="fresh"), execution, 5)
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    model.llm.requires_grad_(trained)
    linears = {module: name for name, module in model.llm.named_modules() if isinstance(module, Linear) and "layers" in name}
    # Held, so that no other tensor gets their place in memory.
    inputs: dict[str, torch.Tensor] = {}

    def seen(x: torch.Tensor, *given: Linear) -> tuple[torch.Tensor, ...]:
        inputs.update({linears[module]: x.detach() for module in given if module in linears})
        return multiply(x, *given)

    for module in (layers, linear_layers):
        monkeypatch.setattr(module, "multiply", seen)
    saved = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.detach())
        return tensor

    batch = tiny.pack(tiny.mixed())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(batch)
    kept = {tensor.untyped_storage().data_ptr() for tensor in saved}
    found = {name.rpartition(".")[2] for name, tensor in inputs.items() if tensor.untyped_storage().data_ptr() in kept}
    assert len(inputs) == len(linears) == 14
    if trained:
        assert found == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        return
    # Attention itself wants its result back, the whole of which is o_proj's input but in a layer for supervised rows.
    assert found <= {"o_proj"}
    with Products() as products:
        loss.backward()
    assert all(parameter.grad is None for parameter in model.llm.parameters())
    rows = {len(batch.token_ids), len(batch.targets)}
    through_decoder = [shape for shape in products.shapes if shape[0] in rows and set(shape[1:]) <= {32, 48}]
    assert len(through_decoder) == len(linears)
