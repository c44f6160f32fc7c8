"""How often Triton would compile each kernel over the micro-batches of a planned run, by the keys of its cache, without a GPU.

    python tests/kernels/compile_keys.py STAGE GPUS MICRO_BATCHES ARCH [ROOM=IMPLEMENTATION ...] [lora.rank=RANK]

Every planned micro-batch of 7B goes through the model, forward and backward, on tensors without data; the decoder and the tower are
shallow, since their layers are alike. What would launch a kernel works out its key from the arguments instead, with Triton's own
code for `ARCH`. Prints, as JSON, the number of keys of each kernel. Attention is not looked at: its kernels are libraries', none of Triton.
"""

import dataclasses
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from fastllava.config import Config, check_config
from fastllava.data.plan import Plan
from fastllava.model.build import build_llava
from fastllava.model.execution import Execution
from fastllava.planner.drawn import draw_like
from fastllava.planner.simulate import MicroBatch, _batch, gpu_ops
from fastllava.planner.sizes import size_named, write_configs
from fastllava.train.metrics.flops import Accounting
from fastllava.train.stages import trained_parts
from fastllava_kernels._device import launch, liger
from fastllava_kernels._tuning import tuning
from fastllava_kernels.op import Op

ARCHITECTURES = {"sm_80": (80, 108), "sm_90": (90, 132)}
"""Compute capability and multiprocessors."""
SAMPLES = 80_000
"""How many are drawn, which is more than 300 micro-batches on 8 GPUs take."""

keys: dict[str, set[str]] = defaultdict(set)
"""Keys of Triton's cache by kernel: by a room's name for one of this package, by file and function for one of a library."""


class Pointer:
    """What Triton looks at of a tensor on a GPU, whose allocations begin at multiples of 512 bytes."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self._address = tensor.dtype, 512 + tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self._address


def count_in_place_of_launching(capability: int) -> None:
    """From now on a launch adds its key to `keys`."""
    backend, binders = make_backend(GPUTarget("cuda", capability, 32)), {}

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        if self not in binders:
            binders[self] = create_function_from_signature(self.signature, self.params, backend)
        given = [Pointer(x) if isinstance(x, Tensor) else x for x in args]
        _, specialization, options = binders[self](*given, **constants)
        own = self.fn.__module__.startswith("fastllava_kernels.")
        keys[configured[-1] if own else f"{self.fn.__module__}.{self.fn.__name__}"].add(compute_cache_key({}, specialization, options))

    def config(kernel: tuning.Kernel, *args: Any) -> dict[str, Any]:
        configured.append(kernel.name)
        return find(kernel, *args)

    find, configured = tuning.config, []
    tuning.config, JITFunction.run = config, run


def run_ops_on_tensors_without_data(arch: str) -> None:
    """From now on an op with kernels runs its code on such tensors, as on a GPU of `arch`, where else it would only give their shapes."""

    register = Op.register_fake

    def register_fake(self: Op, fake: Any) -> Any:
        register(self, fake if "attention" in self.name else self.function)
        return fake

    Op.register_fake = register_fake
    launch.takes = lambda tensor: True
    liger.takes = lambda tensor, interpretable=False: True
    launch.on_device_of = lambda tensor: nullcontext()
    tuning.architecture = lambda device: arch


def let_liger_see(multiprocessors: int) -> None:
    """Give Liger's backwards, which ask the device and count 1 on a CPU, its multiprocessors."""
    from liger_kernel.ops import fused_add_rms_norm, layer_norm

    for module in (fused_add_rms_norm, layer_norm):
        module.math = SimpleNamespace(ceil=lambda rows: ceil(rows / multiprocessors))


RANK = "lora.rank"


def config_for(stage: str, folder: Path, rank: str | None) -> Config:
    """The config of a stage of 7B, whose model's config.json files go under `folder`; with adapters of a `rank`."""
    words = (word.removeprefix("model.").split("=", 1) for word in write_configs("7b", folder))
    model = {name: json.loads(path) for name, path in words}
    lora = {} if rank is None else {"rank": int(rank)}
    return check_config({"stage": stage, "output_dir": str(folder), "model": model, "data": {"records": "r"}, "lora": lora})


def planned(config: Config, origin: Any, gpus: int, count: int) -> Iterator[MicroBatch]:
    """The sizes of the first `count` micro-batches of the first GPU."""
    lengths = draw_like(config.stage, SAMPLES, origin)
    plan = Plan(lengths, config.data, config.train, Accounting.of(config).cost(), gpus)
    for step in map(plan.step, range(plan.n_steps)):
        for ranks in step.micro_batches:
            chosen = step.samples[ranks[0]]
            if not len(chosen):
                continue
            rows, images, supervised = (getattr(lengths, name)[chosen] for name in ("n_tokens", "n_images", "n_supervised"))
            yield MicroBatch(*map(int, (rows.sum(), len(chosen), images.sum(), supervised.sum(), rows.max())))
            count -= 1
            if not count:
                return
    raise ValueError(f"{count} micro-batches too few: draw more samples")


def model_of(config: Config, kernels: dict[str, str]) -> nn.Module:
    """7B's model, shallow, on tensors without data, with what learns in fp32."""
    size = size_named("7b")
    architecture = size.origin
    llm = dataclasses.replace(architecture.llm, num_hidden_layers=2)
    tower = dataclasses.replace(architecture.tower, num_hidden_layers=2)
    execution = dataclasses.replace(Execution.of(config, gpu_ops(kernels)), compile="off")
    model = build_llava(
        dataclasses.replace(architecture, llm=llm, tower=tower, lora=config.lora if config.lora.wanted else None), execution
    )
    learns = {parameter for part in trained_parts(model, config.stage) for parameter in part.parameters()}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            dtype = torch.float32 if parameter in learns else torch.bfloat16
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype), parameter in learns))
    return model


def main() -> None:
    """Print the counts."""
    stage, gpus, count, arch, *chosen = sys.argv[1:]
    capability, multiprocessors = ARCHITECTURES[arch]
    run_ops_on_tensors_without_data(arch)
    count_in_place_of_launching(capability)
    let_liger_see(multiprocessors)
    with tempfile.TemporaryDirectory() as folder:
        kernels = dict(word.split("=") for word in chosen)
        config = config_for(stage, Path(folder), kernels.pop(RANK, None))
        size = size_named("7b")
        sizes = list(planned(config, size.origin, int(gpus), int(count)))
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = model_of(config, kernels)
            for micro_batch in sizes:
                model(_batch(micro_batch, size.spec, config.lora.draws)).backward()
                model.zero_grad(set_to_none=True)
    print(json.dumps({"rows": len({s.rows for s in sizes}), "keys": {name: len(found) for name, found in sorted(keys.items())}}))


if __name__ == "__main__":
    main()
