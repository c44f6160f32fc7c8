"""`parallel.gather`: which calls FSDP2 and NCCL get, on processes that are not there; no GPU moves anything here."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastllava.config import ParallelConfig, check_config
from fastllava.distributed import processes as module
from fastllava.distributed.processes import Processes, processes
from fastllava.distributed.sharding import Sharding, check_gather, shard, sharding_in_words
from fastllava.errors import UserError
from fastllava.model.ops import reference_ops
from fastllava.planner.plan import plan_stage
from fastllava.planner.simulate import bare_model
from fastllava.planner.sizes import SIZES

CPU, GPU = torch.device("cpu"), torch.device("cuda")
COPY = ParallelConfig(gather="copy_engine")


@pytest.fixture
def two() -> Iterator[Processes]:
    """A process group of two that sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield Processes(world=2)
    dist.destroy_process_group()


def sharded(parallel: ParallelConfig, group: Processes) -> tuple[Any, list[FSDPModule]]:
    values = {"stage": "finetune", "output_dir": "o", "model": {"llm": "l", "projector": "fresh"}, "data": {"records": "r"}}
    model = bare_model(check_config(values), SIZES["tiny"].origin, reference_ops()).to_empty(device=CPU)
    model.requires_grad_(True)
    model.tower.requires_grad_(False)
    shard(model, Sharding(group, parallel), CPU)
    return model, [each for each in model.modules() if isinstance(each, FSDPModule)]


@pytest.mark.skipif(not hasattr(FSDPModule, "set_symm_mem_for_comm"), reason="this PyTorch has no gather by copy engines")
@pytest.mark.parametrize("gather", ["kernels", "copy_engine"])
def test_every_group_is_told(gather: Any, two: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    """By PyTorch's own code up to what it does with a GPU: which class gathers, and which reduces, as sums are forced first."""
    # In a child: PyTorch keeps, by mesh, where the shards of this rank lie, and a later test's fork would take that for its own.
    if (child := os.fork()) != 0:
        assert os.waitpid(child, 0)[1] == 0
        return
    failed = 1
    try:
        told_in_a_child(gather, two, monkeypatch)
        failed = 0
    finally:
        os._exit(failed)


def told_in_a_child(gather: Any, two: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed._symmetric_memory as symmetric

    monkeypatch.setattr(symmetric, "set_backend", lambda name: None)
    monkeypatch.setattr(dist, "barrier", lambda **_: None)
    parallel = ParallelConfig(gather=gather)
    model, told = sharded(parallel, two)
    assert len(told) == 3
    kind = "SymmMem" if gather == "copy_engine" else "Default"
    for each in told:
        (group,) = each._get_fsdp_state()._fsdp_param_groups
        assert type(group._all_gather_comm).__name__ == f"{kind}AllGather"
        assert type(group._reduce_scatter_comm).__name__ == f"{kind}ReduceScatter"
    assert ("carried by copy engines" in sharding_in_words(model, Sharding(two, parallel))) is (gather == "copy_engine")


def test_what_cannot_run_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    check_gather(COPY, 1, CPU)
    check_gather(ParallelConfig(), 8, CPU)
    monkeypatch.setattr(FSDPModule, "set_symm_mem_for_comm", lambda self: None, raising=False)
    check_gather(COPY, 8, GPU)
    with pytest.raises(
        UserError, match=r"parallel\.gather: 'copy_engine' is for GPUs, and this run is on a cpu; write parallel\.gather=kernels"
    ):
        check_gather(COPY, 8, CPU)
    monkeypatch.delattr(FSDPModule, "set_symm_mem_for_comm")
    with pytest.raises(UserError, match=r"needs FSDP with set_symm_mem_for_comm, which torch .* has not; write parallel\.gather=kernels"):
        check_gather(COPY, 8, GPU)


@pytest.mark.parametrize(("asked", "before", "after"), [(False, None, None), (True, None, "2"), (True, "1", "1")])
def test_nccl_is_told_before_it_connects(asked: bool, before: str | None, after: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def connecting(*_: Any) -> Any:
        seen.append(os.environ.get("NCCL_CTA_POLICY"))
        raise RuntimeError("far enough")

    monkeypatch.setattr(module, "rendezvous", connecting)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    # So that what is set is taken away again.
    monkeypatch.setenv("NCCL_CTA_POLICY", before or "")
    if before is None:
        monkeypatch.delenv("NCCL_CTA_POLICY")
    with pytest.raises(UserError, match="far enough"), processes(asked):
        pass
    assert seen == [after]


def test_a_plan_of_several_processes_refuses_what_works_in_one() -> None:
    values = {"stage": "finetune", "output_dir": "o", "model": {"llm": "l", "projector": "fresh"}, "data": {"records": "r"}}
    config = check_config({**values, "train": {"fp8": "rowwise"}})
    lengths: Any = None
    gpu: Any = None
    with pytest.raises(UserError, match=r"train\.fp8: 'rowwise' is for a run of one process, not of 8; write train\.fp8=off"):
        plan_stage(config, lengths, gpu, 8)
