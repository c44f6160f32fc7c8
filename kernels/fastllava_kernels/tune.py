"""Write the tables of kernel configurations, offline.

    python -m fastllava_kernels.tune              choose among the candidates by compiling them; needs no GPU
    python -m fastllava_kernels.tune --measure    choose by time on this machine's GPU, for its architecture

Both write tables/<arch>.json under the running Triton minor version; entries of other versions stay as they are. Compiled
choices take the first candidate that passes the ahead-of-time gate; measured ones the fastest of those, by the median of
interleaved runs of the room at LLaVA-1.5 7B's shapes.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch

from fastllava_kernels import aot, rooms, tuning
from fastllava_kernels.tuning import ANY, Config, Kernel

SIZE = "7b"
ROUNDS = 20


def compiling(kernel: Kernel, arch: str) -> list[Config]:
    """The candidates for `arch` that pass the gate, in their order. Raises ValueError when none does."""
    passing, against = [], []
    for config in kernel.candidates[arch]:
        problems = aot.compile_kernel(kernel, config, arch).problems(arch, config["num_warps"], kernel.matmul)
        if problems:
            against.append(f"{dict(config)}: {', '.join(problems)}")
        else:
            passing.append(config)
    if not passing:
        raise ValueError(f"{kernel.name}: no candidate for {arch} passes: {'; '.join(against)}")
    return passing


def fastest(kernel: Kernel, configs: Sequence[Config], bound: int | None, device: torch.device) -> Config:
    """The configuration with the lowest median time of the room's forward and backward, `rows` at the bucket's bound."""
    room = rooms()[kernel.room]
    workload = room.workload
    shape = dict(workload.shapes[SIZE]) | ({} if bound is None else {kernel.rows: bound})
    args = workload.inputs(shape, torch.bfloat16, device, 0)
    function = room.implementations["triton"].function
    times: list[list[float]] = [[] for _ in configs]
    for repeat in range(ROUNDS + 2):
        for config, taken in zip(configs, times, strict=True):
            with tuning.override(kernel.name, config):
                milliseconds = _time(function, args)
            if repeat >= 2:
                taken.append(milliseconds)
    medians = [statistics.median(taken) for taken in times]
    for config, median in zip(configs, medians, strict=True):
        sys.stdout.write(f"{kernel.name} rows {bound or ANY} {dict(config)}: {median:.4f} ms\n")
    return configs[medians.index(min(medians))]


def _time(function: Any, args: Any) -> float:
    """Milliseconds of forward and backward."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    out = function(*args)
    outs = list(out) if isinstance(out, tuple) else [out]
    torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def write(arch: str, chosen: dict[str, dict[str, Config]]) -> None:
    """Put the buckets of each kernel into the table of `arch` under the running Triton; kernels that are gone leave it."""
    path = tuning.TABLES / f"{arch}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    table = {}
    for kernel in tuning.kernels():
        versions = dict(before.get(kernel, {})) | ({aot.triton_minor(): chosen[kernel]} if kernel in chosen else {})
        table[kernel] = dict(sorted(versions.items()))
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write the tables; one line for each choice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="by time on this GPU instead of by compiling for all architectures")
    parser.add_argument("--kernels", nargs="*", help="only these")
    given = parser.parse_args()
    wanted = {name: kernel for name, kernel in tuning.kernels().items() if not given.kernels or name in given.kernels}
    if given.measure:
        device = torch.device("cuda")
        arch = tuning.architecture(device)
        measured = {}
        for name, kernel in wanted.items():
            configs = compiling(kernel, arch)
            bounds: list[int | None] = [*kernel.buckets, None]
            measured[name] = {str(bound or ANY): fastest(kernel, configs, bound, device) for bound in bounds}
        write(arch, measured)
        return
    write("interpreter", {name: {ANY: kernel.candidates["interpreter"][0]} for name, kernel in wanted.items()})
    for arch in aot.ARCHITECTURES:
        compiled = {name: compiling(kernel, arch)[0] for name, kernel in wanted.items()}
        write(arch, {name: {ANY: config} for name, config in compiled.items()})
        for name, config in compiled.items():
            sys.stdout.write(f"{arch} {name}: {dict(config)}\n")


if __name__ == "__main__":
    main()
