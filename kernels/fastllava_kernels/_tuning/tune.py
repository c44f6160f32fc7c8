"""Write the tables of kernel configurations, offline: `python -m fastllava_kernels._tuning.tune` chooses by compiling, without a GPU.

It takes the first candidate that passes the ahead-of-time gate. `fastllava bench tuning` chooses by `measure` here the fastest that
passes it, by the median of interleaved runs of the room at the first of its shapes that launches the kernel. Both write
<arch>.json under the running Triton minor version; entries of other versions stay as they are, and a kernel that only ever runs
with its first candidate is left out.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastllava_kernels import rooms
from fastllava_kernels._tuning import aot, tuning
from fastllava_kernels._tuning.tuning import ANY, Config, Kernel
from fastllava_kernels.workload import Shape

SIZE = "7b"
ROUNDS = 20
WARM_UP = 2


class Noted(Mapping[str, int]):
    """A configuration that knows whether a launch has taken it."""

    def __init__(self, config: Config) -> None:
        self._config, self.taken = config, False

    def __getitem__(self, key: str) -> int:
        self.taken = True
        return self._config[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def __len__(self) -> int:
        return len(self._config)


@dataclass(frozen=True)
class Measured:
    """What a bucket of a kernel takes with each candidate."""

    shape: str
    """The shape of the room's workload that launches the kernel."""
    milliseconds: Mapping[int, float]
    """Median time of the room's forward and backward, by the number of each candidate that ran."""
    chosen: Config
    """The fastest candidate that passes the gate."""
    refused: Sequence[str]
    """Which candidates did not run or did not pass, and why, in words."""


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


def measure(kernel: Kernel, bound: int | None, device: torch.device, size: str = SIZE, rounds: int = ROUNDS) -> Measured:
    """Time every candidate in turn, with `rows` at the bucket's bound, and choose the fastest that passes the gate.

    Raises ValueError when no shape of the size launches the kernel, or nothing passes.
    """
    arch = tuning.architecture(device)
    candidates = kernel.candidates[arch]
    shape, call = _launching(kernel, candidates[0], bound, device, size)
    times, refused = _times(kernel, candidates, call, device, rounds)
    for number in sorted(times, key=times.__getitem__):
        # Without a GPU there is no machine code to look at.
        config = candidates[number]
        problems = (
            aot.compile_kernel(kernel, config, arch).problems(arch, config["num_warps"], kernel.matmul) if device.type == "cuda" else []
        )
        if not problems:
            return Measured(shape, times, config, refused)
        refused.append(f"{dict(config)}: {', '.join(problems)}")
    raise ValueError(f"{kernel.name}: no candidate for {arch} passes: {'; '.join(refused)}")


def _launching(kernel: Kernel, config: Config, bound: int | None, device: torch.device, size: str) -> tuple[str, Callable[[], None]]:
    """The first shape of `size` in the room's workload whose forward and backward launch the kernel, and what runs them."""
    room = rooms()[kernel.room]
    function, workload = room.implementations["triton"].function, room.workload
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, shape in shapes(kernel.room, size).items():
        args = workload.inputs(dict(shape) | ({} if bound is None else {kernel.rows: bound}), dtype, device, 0)
        noted = Noted(config)
        with tuning.override(kernel.name, noted):
            _run(function, args)
        if noted.taken:
            return name, lambda args=args: _run(function, args)
    raise ValueError(f"{kernel.name}: no shape of {size} in room {kernel.room} launches it")


def shapes(room: str, size: str) -> Mapping[str, Shape]:
    """Return the shapes of a room beside a decoder of this size; those of the tower are the same beside every one but "tiny"."""
    found = rooms()[room].workload.shapes
    return {name: shape for name, shape in found.items() if name.partition("-")[0] in (size, "tower" if size != "tiny" else size)}


def _times(
    kernel: Kernel, candidates: Sequence[Config], call: Callable[[], None], device: torch.device, rounds: int
) -> tuple[dict[int, float], list[str]]:
    """Median milliseconds by the candidate's number, and why others did not run, such as for want of shared memory."""
    taken: dict[int, list[float]] = {number: [] for number in range(len(candidates))}
    refused = []
    for repeat in range(rounds + WARM_UP):
        for number in list(taken):
            try:
                with tuning.override(kernel.name, candidates[number]):
                    milliseconds = _time(call, device)
            except Exception as error:
                refused.append(f"{dict(candidates[number])}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
                del taken[number]
                continue
            if repeat >= WARM_UP:
                taken[number].append(milliseconds)
    return {number: statistics.median(each) for number, each in taken.items()}, refused


def _run(function: Any, args: Any) -> None:
    """Run the function forward and, where something learns, backward."""
    out = function(*args)
    outs = list(out) if isinstance(out, tuple) else [out]
    if any(o.requires_grad for o in outs):
        torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])


def _time(call: Callable[[], None], device: torch.device) -> float:
    """Return the milliseconds that a call takes."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def write(arch: str, chosen: Mapping[str, Mapping[str, Config]], folder: Path | None = None) -> Path:
    """Put the buckets of each kernel into the table of `arch` under the running Triton.

    Kernels that are gone leave it, and those whose every entry is their first candidate, with which they run anyway.

    folder: where the table is written, in place of tables/; it starts from the one there, else from that of tables/.
    """
    path = (folder or tuning.TABLES) / f"{arch}.json"
    source = path if path.exists() else tuning.TABLES / f"{arch}.json"
    before = json.loads(source.read_text(encoding="utf-8")) if source.exists() else {}
    table = {}
    for name, kernel in tuning.kernels().items():
        versions = dict(before.get(name, {})) | ({aot.triton_minor(): chosen[name]} if name in chosen else {})
        configs = (dict(config) for buckets in versions.values() for config in buckets.values())
        if any(config != dict(kernel.candidates[arch][0]) for config in configs):
            table[name] = dict(sorted(versions.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return path


def main() -> None:
    """Write the tables, and print a line for each choice."""
    for arch in aot.ARCHITECTURES:
        compiled = {name: compiling(kernel, arch)[0] for name, kernel in tuning.kernels().items()}
        write(arch, {name: {ANY: config} for name, config in compiled.items()})
        for name, config in compiled.items():
            sys.stdout.write(f"{arch} {name}: {dict(config)}\n")


if __name__ == "__main__":
    main()
