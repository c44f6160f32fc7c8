"""Nothing in a step reads a device's numbers on the host: counted on a CPU, and on the meta device, which has none to read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastllava.batch import Batch
from fastllava.config import ModelConfig, OptimConfig, Recompute, Stage
from fastllava.model.execution import Execution
from fastllava.model.llava import Llava
from fastllava.model.ops import Ops, choose_ops
from fastllava.model.weights import load_llava
from fastllava.optim import FiniteGuard, build_optimizer, low_bit, set_lr
from fastllava.train import train_step

# What a GPU takes by itself, where it can run without one; the references may read on the host. On a CPU what an op does inside
# is its own, on the meta device nothing is.
GPU_OPS = {"attention": "varlen", "rms_norm": "triton", "add_rms_norm": "triton", "rope": "triton", "swiglu": "triton"}
READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2"}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class Reads(TorchDispatchMode):
    """Notes every op whose result, or the size of it, the host must wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        self.seen += 1
        by_mask = name in INDEXED and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if name in READS or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: x.masked_select(x > 1),
        lambda x: bool(x.sum() > 1),
        lambda x: x.index_put((x > 1,), x.new_zeros(())),
        lambda x: torch.where(x > 1)[0],
        lambda x: x.unique(),
    ],
)
def test_a_read_is_noticed(read: Callable[[Tensor], object]) -> None:
    with Reads() as reads:
        read(torch.arange(3.0))
    assert reads.found


def batch_of(images: int) -> Batch:
    """Two samples of 12 and 20 rows, the four patches of each image from the second row on, four supervised rows."""
    patches = [start + 1 + p for start in (0, 12)[:images] for p in range(4)]
    supervised = [8, 10, 25, 30]
    return Batch(
        token_ids=torch.ones(32, dtype=torch.int64),
        position_ids=torch.cat((torch.arange(12), torch.arange(20))),
        cu_seqlens=torch.tensor([0, 12, 32], dtype=torch.int32),
        max_seqlen=20,
        pixels=torch.zeros(images, 3, 28, 28, dtype=torch.uint8),
        patch_rows=torch.tensor(patches, dtype=torch.int32),
        text_rows=torch.tensor([row for row in range(32) if row not in patches], dtype=torch.int32),
        supervised_rows=torch.tensor(supervised, dtype=torch.int32),
        targets=torch.ones(4, dtype=torch.int64),
        weights=torch.full((4,), 0.25),
    )


def model_of(world: Path, stage: Stage, recompute: Recompute) -> Llava:
    # bf16: in fp32 Triton's kernels would be interpreted.
    ops = Ops(choose_ops({}, torch.device("cpu"), torch.bfloat16).chosen | GPU_OPS)
    model = load_llava(ModelConfig(llm=world / "llm", vision_tower=world / "clip"), Execution(ops, torch.bfloat16, recompute), 0)
    model.requires_grad_(False)
    for part in (model.projector,) if stage == "pretrain" else (model.projector, model.llm):
        part.float().requires_grad_(True)
    return model


LOW_BIT = {"state": "8bit", "master": "bf16"}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("stage", "recompute", "optim"),
    [("pretrain", "none", {}), ("finetune", "selective", {}), ("finetune", "full", {}), ("finetune", "none", LOW_BIT)],
)
def test_a_step_reads_nothing(world: Path, stage: Stage, recompute: Recompute, optim: dict[str, Any], device: str) -> None:
    if optim:
        pytest.importorskip("torchao", reason="torchao is not installed")
    model = model_of(world, stage, recompute).to(device)
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(lr=1e-3, **optim))
    guard = FiniteGuard(optimizer, torch.device(device))
    set_lr(optimizer, 0.5)
    with Reads() as reads:
        scalars = train_step(model, optimizer, guard, [batch_of(2), batch_of(0)], torch.device(device), 1.0)
    assert reads.found == []
    if device == "meta":
        with pytest.raises(NotImplementedError):
            scalars.read()
    else:
        loss, norm, tripped, *_ = scalars.read()
        assert (loss > 0, norm > 0, tripped) == (True, True, 0.0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_moving_eight_bit_states_reads_nothing(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    # The op's own code, which would otherwise be hidden within it.
    monkeypatch.setattr(low_bit, "advance_piece", low_bit.advance_piece._init_fn)
    weight = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16, device=device))
    optimizer = build_optimizer({"w": weight}.items(), OptimConfig(lr=1e-3, state="8bit", master="bf16"))
    weight.grad = torch.ones(64, 64, device=device)
    with Reads() as reads:
        optimizer.step()
    assert reads.found == []
    assert reads.seen > 50
