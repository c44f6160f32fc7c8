"""Write the tables of kernel configurations, offline: `python -m fastllava_kernels._tuning.tune` chooses by compiling, without a GPU.

It takes the first candidate that passes the ahead-of-time gate. `fastllava bench tuning` takes of those that pass it the fastest, by the
time of the kernel alone: what is here finds a shape of the room that launches it, and keeps its launches. Both write <arch>.json under
the running Triton minor version; entries of other versions stay as they are, and a kernel that only ever runs with its first candidate is
left out.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastllava_kernels import rooms
from fastllava_kernels._device.launch import on_device_of
from fastllava_kernels._tuning import aot, tuning
from fastllava_kernels._tuning.tuning import ANY, Config, Kernel, Noted
from fastllava_kernels.workload import Shape

SIZE = "7b"


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, to be repeated with the same arguments, which stay as it leaves them."""

    function: Any
    grid: Any
    args: Sequence[Any]
    constants: Mapping[str, Any]

    def __call__(self) -> None:
        """Launch it again."""
        with on_device_of(next(x for x in self.args if isinstance(x, Tensor))):
            self.function.run(*self.args, grid=self.grid, warmup=False, **self.constants)


def gate(kernel: Kernel, config: Config, arch: str) -> list[str]:
    """What the ahead-of-time gate has against a candidate, such as that it spills; nothing when all is well."""
    return aot.compile_kernel(kernel, config, arch).problems(arch, config["num_warps"], kernel.matmul)


def compiling(kernel: Kernel, arch: str) -> list[Config]:
    """The candidates for `arch` that pass the gate, in their order. Raises ValueError when none does."""
    passing, against = [], []
    for config in kernel.candidates[arch]:
        problems = gate(kernel, config, arch)
        if problems:
            against.append(f"{dict(config)}: {', '.join(problems)}")
        else:
            passing.append(config)
    if not passing:
        raise ValueError(f"{kernel.name}: no candidate for {arch} passes: {'; '.join(against)}")
    return passing


def launching(kernel: Kernel, config: Config, bound: int | None, device: torch.device, size: str) -> tuple[str, Callable[[], None]]:
    """The first shape of `size` in the room's workload whose forward and backward launch the kernel, and what runs them.

    bound: the rows, in place of the shape's. Raises ValueError when no shape launches it.
    """
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


@contextmanager
def launches(kernel: Kernel, config: Config) -> Iterator[list[Launch]]:
    """Grows by each launch of the kernel within, which takes this configuration. Those of others with the same function are left out."""
    found: list[Launch] = []
    asked: list[str] = []
    launch = kernel.function.run

    def run(*args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        if asked and asked[-1] == kernel.name:
            found.append(Launch(kernel.function, grid, args, constants))
        return launch(*args, grid=grid, warmup=warmup, **constants)

    with ExitStack() as stack:
        for other in (other for other in tuning.kernels().values() if other.function is kernel.function):
            chosen = config if other is kernel else tuning.config(other, 2**31, torch.device("cpu"))
            stack.enter_context(tuning.override(other.name, Noted(chosen, lambda name=other.name: asked.append(name))))
        kernel.function.run = run
        try:
            yield found
        finally:
            del kernel.function.run


def shapes(room: str, size: str) -> Mapping[str, Shape]:
    """Return the shapes of a room beside a decoder of this size; those of the tower are the same beside every one but "tiny"."""
    found = rooms()[room].workload.shapes
    return {name: shape for name, shape in found.items() if name.partition("-")[0] in (size, "tower" if size != "tiny" else size)}


def _run(function: Any, args: Any) -> None:
    """Run the function forward and, where something learns, backward."""
    out = function(*args)
    outs = list(out) if isinstance(out, tuple) else [out]
    if any(o.requires_grad for o in outs):
        torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])


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
