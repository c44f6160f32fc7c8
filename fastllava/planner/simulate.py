"""An optimizer step of a run on one of its GPUs, on tensors without data: the code that trains, and what it allocates.

The layers of a decoder are alike, so two shallow decoders say what a deep one takes: every figure is linear in their number.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastllava.batch import Batch, ImageSpec
from fastllava.config import Config
from fastllava.data.plan import Plan
from fastllava.distributed.processes import Processes
from fastllava.distributed.sharding import Sharding, mesh_of, shard
from fastllava.model.architecture import Architecture
from fastllava.model.build import build_llava
from fastllava.model.execution import COMPUTE_DTYPE, Execution
from fastllava.model.llava import Llava
from fastllava.model.ops import Ops
from fastllava.model.quantised import Nf4Weight
from fastllava.optim import FiniteGuard, build_optimizer, clip_gradients, gradient_norm, parameters
from fastllava.optim.low_bit import check_low_bit
from fastllava.planner.tally import Tally
from fastllava.train import train_step
from fastllava.train.stages import trained_parts
from fastllava_kernels import rooms
from fastllava_kernels.room import REFERENCE

FROZEN, MASTERS, OPTIMIZER, GRADIENTS = "frozen weights", "master weights", "optimizer", "gradients"

_SHALLOW = (3, 4)
"""Layers of the two decoders: more than the first and the last, which are not like the others."""


@dataclass(frozen=True)
class MicroBatch:
    """The size of one."""

    rows: int
    samples: int
    images: int
    supervised: int
    longest: int
    """Rows of the longest sample."""

    @classmethod
    def largest(cls, plan: Plan, indices: Iterable[int]) -> "MicroBatch":
        """As much of each thing as any micro-batch of these steps has."""
        sizes = []
        for step in map(plan.step, indices):
            for positions in (positions for ranks in step.micro_batches for positions in ranks if len(positions)):
                chosen = step.samples[positions]
                rows, images, supervised = (getattr(plan.lengths, name)[chosen] for name in ("n_tokens", "n_images", "n_supervised"))
                sizes.append((rows.sum(), len(chosen), images.sum(), supervised.sum(), rows.max()))
        return cls(*np.array(sizes).max(axis=0).tolist())


@dataclass(frozen=True)
class StepCost:
    """What a step costs one GPU, in bytes."""

    memory: Mapping[str, int]
    """By kind, at the moment when all together are most."""
    traffic: Mapping[str, int]
    """By part, what ops other than products, attention and the optimizer read and write for one micro-batch."""
    communicated: int
    """What collectives gather or reduce for one micro-batch."""

    @property
    def peak(self) -> int:
        """All of `memory`."""
        return sum(self.memory.values())

    @property
    def moved(self) -> int:
        """All of `traffic`."""
        return sum(self.traffic.values())


@dataclass(frozen=True)
class Dispatched:
    """An op as PyTorch dispatches it in a layer."""

    count: float
    bytes: float
    """Read and written."""


def simulate(config: Config, architecture: Architecture, ops: Ops, micro_batch: MicroBatch, accumulates: bool, world: int = 1) -> StepCost:
    """The cost, on one of `world` GPUs, of a step's micro-batch that is this large, the optimizer's work included.

    `accumulates`: one of several of the step. It computes nothing, and needs no GPU, no weights and no other process.
    Raises UserError as `check_low_bit`.
    """
    check_low_bit(config.optim, world)
    with _stand_in_processes(world):
        return _deep(config, architecture, ops, micro_batch, accumulates, world)


def _deep(config: Config, architecture: Architecture, ops: Ops, micro_batch: MicroBatch, accumulates: bool, world: int) -> StepCost:
    layers = architecture.llm.num_hidden_layers
    depths = _SHALLOW if layers > max(_SHALLOW) else (layers, layers)
    costs = {depth: _simulate(config, architecture, ops, micro_batch, accumulates, world, depth) for depth in sorted(set(depths))}
    few, more = (costs[depth] for depth in depths)
    steps = (layers - depths[0]) / max(1, depths[1] - depths[0])

    def deep(at_few: int, at_more: int) -> int:
        return round(at_few + steps * (at_more - at_few))

    def each(at_few: Mapping[str, int], at_more: Mapping[str, int]) -> dict[str, int]:
        return {name: deep(at_few.get(name, 0), at_more.get(name, 0)) for name in at_few.keys() | at_more.keys()}

    return StepCost(each(few.memory, more.memory), each(few.traffic, more.traffic), deep(few.communicated, more.communicated))


@dataclass(frozen=True)
class LayerOps:
    """What one decoder layer dispatches for one micro-batch of several on one GPU."""

    moving: Mapping[tuple[str, str], Dispatched]
    """What moves anything, by part of the step and op."""
    all: Mapping[tuple[str, str], float]
    """How many ops, views too, by part of the step and namespace."""


def layer_ops(config: Config, architecture: Architecture, ops: Ops, micro_batch: MicroBatch) -> LayerOps:
    """Look at one decoder layer: the difference of two shallow decoders, whose first and last layers are not like the others."""
    (few, batches), (more, _) = (_tallied(config, architecture, ops, micro_batch, True, 1, depth) for depth in _SHALLOW)
    moving = {
        key: Dispatched(count / batches, (more.moved[key] - few.moved[key]) / batches)
        for key, count in _differences(few.ops, more.ops).items()
    }
    return LayerOps(moving, {key: count / batches for key, count in _differences(few.dispatched, more.dispatched).items()})


def _differences(few: Counter[tuple[str, str]], more: Counter[tuple[str, str]]) -> dict[tuple[str, str], int]:
    return {key: more[key] - few[key] for key in sorted(more) if more[key] != few[key]}


@contextmanager
def _stand_in_processes(world: int) -> Iterator[None]:
    """A process group of this size that sends nothing."""
    if world == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def gpu_ops(kernels: Mapping[str, str]) -> Ops:
    """The ops of a run on a GPU: those asked for by name, else the first that `auto` may take on one."""
    chosen = {}
    for name, room in rooms().items():
        # Of attention the one that PyTorch has: what must be installed may not be there.
        auto = next(n for n, each in room.implementations.items() if "cuda" in each.auto_on and n not in ("fa3", "fa4"))
        wanted = kernels.get(name, "auto")
        implementation = auto if wanted == "auto" else wanted
        # torch.compile does not go on tensors without data; what its graphs allocate is about what eager ops do.
        chosen[name] = REFERENCE if implementation == "compiled" else implementation
    return Ops(chosen)


def _simulate(
    config: Config, architecture: Architecture, ops: Ops, micro_batch: MicroBatch, accumulates: bool, world: int, layers: int
) -> StepCost:
    tally, batches = _tallied(config, architecture, ops, micro_batch, accumulates, world, layers)
    memory = {kind: size for kind, size in tally.peak.items() if size}
    traffic = {part: moved // batches for part, moved in tally.traffic.items()}
    return StepCost(memory, traffic, tally.communicated // batches)


def _tallied(
    config: Config, architecture: Architecture, ops: Ops, micro_batch: MicroBatch, accumulates: bool, world: int, layers: int
) -> tuple[Tally, int]:
    """What a step does with so many layers, and of how many micro-batches."""
    dtype, device = COMPUTE_DTYPE[config.train.precision], torch.device("cpu")
    llm = dataclasses.replace(architecture.llm, num_hidden_layers=layers)
    model = bare_model(config, dataclasses.replace(architecture, llm=llm), ops)
    # Copy engines move the same bytes, and there are none here.
    sharding = Sharding(Processes(world=world), config.parallel.model_copy(update={"gather": "kernels"}))
    mesh = mesh_of(sharding, device)
    with FakeTensorMode(allow_non_fake_inputs=True), Tally(sharded=world > 1) as tally:
        _place(model, config, dtype, tally)
        shard(model, sharding, device, mesh)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        for parameter in model.parameters():
            tally.name(parameter, MASTERS if parameter.requires_grad else FROZEN)
        with tally.kind(OPTIMIZER):
            optimizer = build_optimizer(trained.items(), config.optim)
        if world > 1:
            _first_optimizer_step(optimizer)
        with tally.kind(GRADIENTS):
            for parameter in trained.values():
                # What earlier micro-batches of the step have left.
                parameter.grad = torch.zeros_like(parameter, dtype=torch.float32) if accumulates else None
        if not accumulates and world == 1:
            for parameter in trained.values():
                parameter.register_post_accumulate_grad_hook(lambda p: tally.name(p.grad, GRADIENTS))
        guard, batch = FiniteGuard(optimizer, device), _batch(micro_batch, architecture.spec, config.lora.draws)
        tally.watch(model)
        tally.begin()
        # Two where there are several: a micro-batch also finds what the one before it has not given back yet.
        batches = [batch] * (2 if accumulates else 1)
        train_step(model, optimizer, guard, batches, device, config.optim.max_grad_norm, sharding)
    return tally, len(batches)


def _first_optimizer_step(optimizer: torch.optim.Optimizer) -> None:
    """A step that is not counted: at the first, DTensor works every op out on whole tensors without data, which look like memory."""
    params = parameters(optimizer)
    for parameter in params:
        parameter.grad = torch.zeros_like(parameter)
    clip_gradients(params, gradient_norm(params), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def bare_model(config: Config, architecture: Architecture, ops: Ops) -> Llava:
    """The model of a run, its parameters on the meta device."""
    # torch.compile does not go on fake tensors, and fp8 allocates about what bf16 does.
    return build_llava(architecture, dataclasses.replace(Execution.of(config, ops), compile="off", fp8="off"))


def _place(model: Llava, config: Config, dtype: torch.dtype, tally: Tally) -> None:
    """Parameters without data in place of the model's, as `prepare_stage` leaves them."""
    trains = {parameter for part in trained_parts(model, config.stage) for parameter in part.parameters()}
    made: dict[nn.Parameter, nn.Parameter] = {}
    master = COMPUTE_DTYPE[config.optim.master]
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            kept = parameter.dtype if isinstance(module, Nf4Weight) else dtype
            if parameter not in made:
                train = parameter in trains
                with tally.kind(MASTERS if train else FROZEN):
                    made[parameter] = nn.Parameter(torch.empty(parameter.shape, dtype=master if train else kept), train)
            setattr(module, name, made[parameter])
    model.train()


def _batch(size: MicroBatch, spec: ImageSpec, draws: bool) -> Batch:
    """A batch of this size without data; with keys of its rows where something is drawn by them."""
    patches = size.images * spec.patches
    return Batch(
        token_ids=torch.empty(size.rows, dtype=torch.int64),
        position_ids=torch.empty(size.rows, dtype=torch.int64),
        cu_seqlens=torch.empty(size.samples + 1, dtype=torch.int32),
        max_seqlen=size.longest,
        pixels=torch.empty(size.images, 3, spec.size, spec.size, dtype=torch.uint8),
        patch_rows=torch.empty(patches, dtype=torch.int32),
        text_rows=torch.empty(max(0, size.rows - patches), dtype=torch.int32),
        supervised_rows=torch.empty(size.supervised, dtype=torch.int32),
        targets=torch.empty(size.supervised, dtype=torch.int64),
        weights=torch.empty(size.supervised),
        row_keys=torch.empty(size.rows, dtype=torch.int64) if draws else None,
    )
