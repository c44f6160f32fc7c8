"""The plan of a stage: which recompute and micro-batch fit, which of these is fastest, and what the whole run takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from fastllava.config import Config, Recompute
from fastllava.data.plan import Figures, Lengths, Plan, SampleLengths, held_out_of
from fastllava.distributed.sharding import FROZEN_SHARE
from fastllava.model.execution import COMPUTE_DTYPE
from fastllava.model.ops import reference_ops
from fastllava.model.quantised import count
from fastllava.model.weights import Origin, read_origin
from fastllava.optim.low_bit import traffic_bytes
from fastllava.planner import attention
from fastllava.planner.attention import implementation_of
from fastllava.planner.gpus import COPY_SHARE, NETWORK, NODE, PRODUCT_SHARE, STEP_SHARE, Gpu
from fastllava.planner.simulate import MicroBatch, StepCost, bare_model, gpu_ops, simulate
from fastllava.train.machine import check_fp8_alone
from fastllava.train.metrics.flops import Accounting, Work
from fastllava.train.stages import trained_parts

ROWS = (2048, 4096, 8192, 16384, 32768)
"""Sizes of a micro-batch that are looked at."""
_STEPS_LOOKED_AT = 40


@dataclass(frozen=True)
class Seconds:
    """The parts of a step on one GPU, each at its own ceiling."""

    products: float
    """Matrix products; the tower's attention too."""
    attention: float
    """The decoder's, by what its implementation is known to reach."""
    traffic: float
    """What other ops read and write."""
    optimizer: float
    communication: float
    """Gathering weights and reducing gradients, beside the other work as far as that lasts."""

    @property
    def step(self) -> float:
        """The seconds of a whole step: the sum, and what is assumed to be lost between its parts."""
        return (max(self.computing, self.communication) + self.optimizer) / STEP_SHARE

    @property
    def computing(self) -> float:
        """Forward and backward."""
        return self.products + self.attention + self.traffic


@dataclass(frozen=True)
class Candidate:
    """One way to run the stage."""

    recompute: str
    micro_batch_tokens: int
    packed: Figures
    cost: StepCost
    seconds: Seconds
    mfu: float
    """Operations that the training needs, a second, over the peak."""

    def fits(self, gpu: Gpu) -> bool:
        """Whether the most that lives at once fits on it."""
        return self.cost.peak <= gpu.usable


@dataclass(frozen=True)
class Evaluations:
    """What looking at a held-out share of the records takes."""

    samples: int
    times: int
    seconds: float
    """How long one of them takes."""


@dataclass(frozen=True)
class StagePlan:
    """What was found of one stage."""

    config: Config
    gpu: Gpu
    world: int
    plan: Plan
    parameters: Mapping[str, int]
    """trained and frozen."""
    candidates: list[Candidate]
    chosen: Candidate | None
    """The fastest that fits; None when none does."""
    evaluations: Evaluations | None = None
    """None where no share of the records is held out."""

    @property
    def hours(self) -> float | None:
        """The hours of the whole stage."""
        return None if self.chosen is None else self.plan.n_steps * self.chosen.seconds.step / 3600

    @property
    def gpu_hours(self) -> float | None:
        """The hours of all GPUs together."""
        return None if self.hours is None else self.world * self.hours

    @property
    def limit(self) -> str:
        """What to change first for a faster run."""
        if self.chosen is None:
            return "memory: nothing fits"
        parts = vars(self.chosen.seconds)
        most = max(parts, key=parts.__getitem__)
        words = {
            "products": "matrix products",
            "attention": "attention",
            "traffic": "memory bandwidth",
            "optimizer": "the optimizer's memory traffic",
            "communication": "communication",
        }[most]
        unlimited = min(candidate.seconds.step for candidate in self.candidates)
        if unlimited < 0.99 * self.chosen.seconds.step:
            return f"memory: with more of it a step would take {unlimited:.2f} s; after that {words}"
        return words


def plan_stage(config: Config, lengths: Lengths, gpu: Gpu, world: int) -> StagePlan:
    """Plan the stage of `config` for samples of these lengths on `world` GPUs. Reads the config.json files of its model, no weight.

    Raises UserError as `read_origin`, `simulate` and `check_fp8_alone`.
    """
    check_fp8_alone(config, world)
    origin = read_origin(config.model, config.lora)
    parameters = _parameters(origin, config)
    if config.parallel.frozen == "auto":
        fits = parameters["frozen"] * COMPUTE_DTYPE[config.train.precision].itemsize <= FROZEN_SHARE * gpu.memory
        replicates = fits or config.model.quantize is not None
        config = _with(config, "parallel", frozen="replicate" if replicates else "shard")
    held_out = held_out_of(len(lengths.n_tokens), config.eval.share, config.train.seed)
    plan = Plan(lengths, config.data, config.train, Accounting.of(config).cost(), world, held_out)
    some = _some_steps(plan)
    candidates: list[Candidate] = []
    for recompute in get_args(Recompute):
        # More rows take more memory, and are no slower: the most that fit end the search.
        for rows in sorted(ROWS, reverse=True):
            changed = _with(config, "train", recompute=recompute, micro_batch_tokens=rows, epochs=1, max_steps=None)
            changed = _with(changed, "data", shuffle=False)
            candidates.append(_candidate(changed, origin, some, gpu, world, parameters["trained"]))
            if candidates[-1].fits(gpu):
                break
        if candidates[-1].fits(gpu) and candidates[-1].micro_batch_tokens == max(ROWS):
            # Another recompute would only repeat work.
            break
    chosen = min((c for c in candidates if c.fits(gpu)), key=lambda candidate: candidate.seconds.step, default=None)
    evaluations = _evaluations(config, plan, held_out, gpu) if len(held_out) else None
    return StagePlan(config, gpu, world, plan, parameters, candidates, chosen, evaluations)


def _evaluations(config: Config, plan: Plan, held_out: NDArray[np.int64], gpu: Gpu) -> Evaluations:
    lengths, every = SampleLengths.of(plan.lengths, held_out), config.eval.every_steps
    work = Work.of(lengths.n_tokens, lengths.n_images, lengths.n_supervised)
    accounting = Accounting.of(config)
    products = (accounting.forward_flops(work) - accounting.model_flops(work).attention / 3) / (PRODUCT_SHARE * gpu.peak)
    chosen = implementation_of(config.kernels["attention"], gpu)
    taken = attention.seconds(accounting.llm, lengths.n_tokens, gpu, chosen, backward=False)
    seconds = (products + taken) / (plan.world * STEP_SHARE)
    return Evaluations(len(held_out), 1 if every is None else len({*range(0, plan.n_steps, every), plan.n_steps}), seconds)


def _candidate(config: Config, origin: Origin, lengths: Lengths, gpu: Gpu, world: int, trained: int) -> Candidate:
    """What a way to run it costs, by some of its steps: the samples of `lengths` in their order."""
    accounting = Accounting.of(config)
    plan = Plan(lengths, config.data, config.train, accounting.cost(), world)
    packed = plan.figures(range(plan.n_steps))
    largest = MicroBatch.largest(plan, range(plan.n_steps))
    cost = simulate(config, origin, gpu_ops(config.kernels), largest, packed.micro_batches > 1, world)
    work = Work.of(lengths.n_tokens, lengths.n_images, lengths.n_supervised)
    shares = plan.n_steps * world
    hardware = accounting.hardware_flops(work)
    done, needed = (hardware.total - hardware.attention) / shares, accounting.model_flops(work).total / shares
    # The largest micro-batch was simulated; what others move goes with their rows.
    full = work.rows / shares / largest.rows
    train = config.train
    chosen = implementation_of(config.kernels["attention"], gpu)
    taken = attention.seconds(
        origin.llm, lengths.n_tokens, gpu, chosen, forwards=2 if train.recompute == "full" else 1, one_order=train.deterministic is True
    )
    shards = world // config.parallel.replicas
    link = gpu.link if world <= NODE else min(gpu.link, NETWORK)
    bandwidth = COPY_SHARE * gpu.bandwidth
    seconds = Seconds(
        products=packed.imbalance * done / (PRODUCT_SHARE * gpu.peak),
        attention=packed.imbalance * taken / shares,
        traffic=full * cost.moved / bandwidth,
        optimizer=traffic_bytes(config.optim) * trained / shards / bandwidth,
        communication=packed.micro_batches * cost.communicated * (world - 1) / world / link,
    )
    return Candidate(train.recompute, train.micro_batch_tokens, packed, cost, seconds, needed / (seconds.step * gpu.peak))


def _some_steps(plan: Plan) -> SampleLengths:
    """The samples of steps that lie evenly over an epoch, in the order of the steps."""
    last = min(plan.n_steps, plan.steps_per_epoch) - 1
    indices = np.unique(np.linspace(0, last, _STEPS_LOOKED_AT, dtype=int)).tolist()
    return SampleLengths.of(plan.lengths, np.concatenate([plan.step(index).samples for index in indices]))


def _with(config: Config, section: str, **values: Any) -> Config:
    """`config` with these keys of a section changed."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _parameters(origin: Origin, config: Config) -> Mapping[str, int]:
    """How many train, and how many do not."""
    with torch.device("meta"):
        model = bare_model(config, origin, reference_ops())
    trained = sum(p.numel() for part in trained_parts(model, config.stage) for p in part.parameters())
    return {"trained": trained, "frozen": count(model) - trained}
