"""A run of fastllava on drawn samples: the configuration, the plan and the step are the trainer's own."""

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastllava.batch import Batch
from fastllava.config import Config, Stage, load_config
from fastllava.data.loader import Sample, pack
from fastllava.data.plan import Plan, Step
from fastllava.data.row_keys import row_keys
from fastllava.model.build import build_llava
from fastllava.model.compiled import check_compiler
from fastllava.model.execution import COMPUTE_DTYPE, Execution
from fastllava.model.llava import Llava
from fastllava.model.ops import choose_ops
from fastllava.model.quantised import Nf4Weight, put, weights_by_name
from fastllava.model.weights import Origin
from fastllava.optim import FiniteGuard, build_optimizer, set_lr
from fastllava.optim.low_bit import check_low_bit
from fastllava.planner.drawn import CAP, Samples, draw
from fastllava.planner.sizes import Size
from fastllava.train import train_step
from fastllava.train.deterministic import is_asked_for, set_deterministic
from fastllava.train.machine import check_fp8, check_fp8_widths, set_tf32
from fastllava.train.metrics.flops import Accounting, Flops, Work
from fastllava.train.metrics.log import DeviceScalars
from fastllava.train.stages import prepare_stage

DRAWN = 2048
"""Samples to plan from: 8 steps of the larger global batch."""
STD = 0.02
"""Standard deviation of random weights."""


@dataclass(frozen=True)
class Run:
    """What is trained on what. The steps are those of the recipe, or some samples of each."""

    size: Size
    config: Config
    samples: Samples
    plan: Plan
    accounting: Accounting

    @property
    def origin(self) -> Origin:
        """The model's architecture, with what the configuration says of adapters and quantised weights."""
        return _origin(self.size, self.config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        return COMPUTE_DTYPE[self.config.train.precision]

    @property
    def n_steps(self) -> int:
        """How many different steps there are."""
        return self.plan.steps_per_epoch

    def step(self, index: int) -> Step:
        """Step `index`; the steps come again after the last."""
        return self.plan.step(index % self.n_steps)

    def contents(self, step: Step) -> list[Sample]:
        """Its samples in the recipe's order, each supervised token weighing what it does in the mean over the step."""
        return [self.samples.sample(i, w) for i, w in zip(step.samples.tolist(), step.weights.tolist(), strict=True)]

    def work(self, step: Step) -> Work:
        """The work that the step needs."""
        return self.samples.work(step.samples)


def plan_run(stage: Stage, size: Size, settings: Mapping[str, Any], overrides: Sequence[str] = (), per_step: int | None = None) -> Run:
    """A run of `stage` with `settings` of section train, then `key=value` words; `per_step`: only so many samples of each step.

    Raises UserError on keys and values that are none.
    """
    config = config_of(stage, settings, overrides)
    samples = draw(stage, DRAWN, size.spec, size.llm.vocab_size, config.train.seed)
    accounting = Accounting.of_model(_origin(size, config), stage, config.train.recompute, config.train.last_layer)
    plan = Plan(samples, config.data, config.train, accounting.cost())
    if per_step is not None:
        plan = _Shorter(plan, min(per_step, plan.train.global_batch))
    return Run(size, config, samples, plan, accounting)


def _origin(size: Size, config: Config) -> Origin:
    lora = config.lora if config.lora.wanted else None
    return replace(size.origin, lora=lora, quantize=config.model.quantize)


def config_of(stage: Stage, train: Mapping[str, Any], overrides: Sequence[str]) -> Config:
    """The configuration as `fastllava train` reads it from a file; the folders it names are never read."""
    given = {
        "stage": stage,
        "output_dir": "not-written",
        "model": {"llm": "random-weights", "projector": "fresh"},
        "data": {"records": "drawn", "max_tokens": CAP},
        "train": dict(train),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bench.yaml")
        path.write_text(json.dumps(given))
        return load_config(path, overrides)


class _Shorter(Plan):
    """Some samples that follow each other in another plan's steps, from a random place: a step's first ones are its longest."""

    def __init__(self, whole: Plan, per_step: int) -> None:
        train = whole.train.model_copy(update={"global_batch": per_step, "max_steps": None})
        super().__init__(whole.lengths, whole.data, train, whole.cost)
        full = [samples for i in range(whole.steps_per_epoch) if len(samples := whole.step(i).samples) >= per_step]
        places = np.random.default_rng(whole.train.seed).integers(0, 2**31, len(full))
        starts = [place % (len(samples) // per_step) * per_step for place, samples in zip(places.tolist(), full, strict=True)]
        self._chosen = np.concatenate([samples[start : start + per_step] for samples, start in zip(full, starts, strict=True)])
        self.steps_per_epoch = len(self._chosen) // per_step

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        return self._chosen


def build(origin: Origin, execution: Execution, device: torch.device, seed: int = 0) -> Llava:
    """Our model with random weights in the dtype of `execution`: N(0, 0.02^2), norms near one, the projector as PyTorch draws a Linear."""
    model = build_llava(origin, execution)
    generator = torch.Generator(device).manual_seed(seed)
    drawn = {f"projector.{name}": weight for name, weight in model.projector.draw(seed).items()}
    for name, weight in weights_by_name(model).items():
        if name not in drawn:
            drawn[name] = torch.randn(weight.shape, device=device, generator=generator) * STD
            drawn[name] += "norm" in name and name.endswith("weight")
        # On the host, where weights are read and quantised.
        put(model, name, drawn.pop(name).to("cpu" if isinstance(weight, Nf4Weight) else device, execution.dtype))
    return model.to(device)


class Fastllava:
    """The trainer's own step with random weights. The learning rate is 0, as at step 0 of the recipe, so the weights stay as they are."""

    def __init__(self, run: Run, device: torch.device, seed: int = 0) -> None:
        mode = run.config.train.compile
        check_compiler(mode, device)
        check_low_bit(run.config.optim, world=1)
        check_fp8(run.config, device, world=1)
        check_fp8_widths(run.config, run.size.llm)
        self.run, self.device = run, device
        set_deterministic(run.config)
        ops = choose_ops(run.config.kernels, device, run.dtype, compiled=mode != "off", repeats=is_asked_for(run.config))
        self.model = build(run.origin, Execution.of(run.config, ops), device, seed)
        self.trained: dict[str, nn.Parameter] = prepare_stage(self.model, run.config)
        self.optimizer = build_optimizer(self.trained.items(), run.config.optim, run.config.train.seed)
        set_lr(self.optimizer, 0.0)
        self.guard = FiniteGuard(self.optimizer, device)

    def batches(self, step: Step) -> list[Batch]:
        """The step's micro-batches, as the loader hands them over."""
        samples = self.run.contents(step)
        packed = [self._packed(step, samples, ranks[0].tolist()) for ranks in step.micro_batches]
        return [batch.pin_memory() for batch in packed] if self.device.type == "cuda" else packed

    def _packed(self, step: Step, samples: Sequence[Sample], places: Sequence[int]) -> Batch:
        batch, config = pack([samples[place] for place in places], self.run.samples.spec, CAP), self.run.config
        if not config.lora.draws:
            return batch
        lengths = batch.cu_seqlens.diff().tolist()
        keys = row_keys(config.train.seed, step.index, step.samples[places].tolist(), lengths)
        return replace(batch, row_keys=torch.from_numpy(keys))

    def step(self, batches: Sequence[Batch], judged: bool = True) -> DeviceScalars:
        """One optimizer step: its loss and the norm of its gradient, which the trainer takes anyway, then what else it reads."""
        set_tf32(self.run.config)
        set_deterministic(self.run.config)
        return train_step(self.model, self.optimizer, self.guard, batches, self.device, self.run.config.optim.max_grad_norm)

    def hardware_flops(self, step: Step) -> Flops:
        """The operations that it does in a step."""
        return self.run.accounting.hardware_flops(self.run.work(step))

    def rows(self, step: Step) -> int:
        """The tokens that its decoder computes in a step: none of them is padding."""
        return self.run.work(step).rows

    def state_bytes(self) -> int:
        """The bytes of weights and optimizer."""
        states = [value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        return tensor_bytes([*self.model.parameters(), *self.model.buffers(), *states])


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of their storages, each counted once."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())
