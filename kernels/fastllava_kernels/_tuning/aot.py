"""Compile every Triton kernel with every configuration it may have for A100 and H100, without a GPU, and judge the result.

    python -m fastllava_kernels._tuning.aot [--write FILE | --check FILE]

Each is compiled for sizes that 16 divides, as they are in training, and for sizes that 16 does not divide. The table is committed.
`--check` says what became worse than it: narrower loads or stores, fewer warps on a multiprocessor, tensor-core instructions lost.
"""

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastllava_kernels._device.launch import INTERPRETED
from fastllava_kernels._tuning import aot_table, machine_code, tuning
from fastllava_kernels._tuning.machine_code import Resources

ARCHITECTURES = {"sm_80": 80, "sm_90": 90}


def compile_kernel(kernel: tuning.Kernel, config: tuning.Config, arch: str, aligned: bool = True) -> Resources:
    """The resources of `kernel` in `config` for "sm_80" or "sm_90"; `aligned`: for sizes that 16 divides."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 leaves nothing to compile; unset it")
    constants = {**kernel.constants, **({} if aligned else kernel.unaligned)}
    constants |= {key: value for key, value in config.items() if key not in ("num_warps", "num_stages")}
    names = kernel.function.arg_names
    unknown = set(names) ^ (set(constants) | set(kernel.signature))
    if unknown:
        raise ValueError(f"{kernel.name}: {', '.join(sorted(unknown))} is in its parameters or in its description, not in both")
    divisible = {name for name, kind in kernel.signature.items() if kind.startswith("*")} | (kernel.divisible if aligned else set())
    # In the order of the parameters, which Triton's cache of compiled kernels goes by.
    source = ASTSource(
        kernel.function,
        signature={name: "constexpr" if name in constants else kernel.signature[name] for name in names},
        constexprs={(at,): constants[name] for at, name in enumerate(names) if name in constants},
        attrs={(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name in divisible},
    )
    options = {key: config[key] for key in ("num_warps", "num_stages")} | tuning.FUSION
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURES[arch], 32), options=options)
    return machine_code.read(compiled.asm["cubin"], compiled.metadata.shared)


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    kernel: str
    arch: str
    tuned: str
    """The Triton minor version that a table's entry was chosen with, or tuning.FIRST."""
    bucket: str
    config: tuple[tuple[str, int], ...]
    aligned: bool = True

    @property
    def compiled(self) -> tuple[Any, ...]:
        """What it is compiled from: rooms share kernels, and the code of a shared one is looked at once."""
        kernel = tuning.kernels()[self.kernel]
        given = (kernel.signature, kernel.constants, kernel.unaligned, sorted(kernel.divisible))
        return kernel.function, *map(str, given), kernel.matmul, self.arch, self.config, self.aligned


def entries() -> list[Entry]:
    """Every configuration of every kernel on every architecture, for sizes that 16 divides and for others."""
    found = [
        Entry(kernel, arch, tuned, bucket, tuple(config.items()), aligned)
        for arch in ARCHITECTURES
        for kernel, tuned, bucket, config in tuning.configurations(arch)
        for aligned in (True, False)
    ]
    return sorted(found, key=lambda entry: (entry.kernel, entry.arch, entry.tuned, entry.bucket, not entry.aligned))


def judge(entry: Entry) -> tuple[Resources, list[str]]:
    """The entry's resources, and what the gate has against them."""
    kernel, config = tuning.kernels()[entry.kernel], dict(entry.config)
    resources = compile_kernel(kernel, config, entry.arch, entry.aligned)
    return resources, resources.problems(entry.arch, config["num_warps"], kernel.matmul, entry.aligned)


Judged = list[tuple[Entry, Resources, list[str]]]


def rows(judged: Judged) -> list[aot_table.Row]:
    """The lines of the table."""
    found = []
    for entry, resources, _ in judged:
        config = " ".join(f"{key}={value}" for key, value in entry.config)
        sizes = aot_table.ALIGNED if entry.aligned else aot_table.ANY_SIZE
        what = (entry.kernel, entry.arch, entry.tuned, entry.bucket, sizes, config)
        found.append(aot_table.row(what, resources, resources.warps_resident(entry.arch, dict(entry.config)["num_warps"])))
    return found


def render(judged: Judged) -> str:
    """The table in Markdown."""
    return "\n".join(_lines(judged)) + "\n"


def _lines(judged: Judged) -> Iterator[str]:
    yield "# Compiled ahead of time"
    yield ""
    command = "python -m fastllava_kernels._tuning.aot --write kernels/aot.md"
    yield f"By `{command}`, Triton {triton_minor()}, bf16; nothing here was measured on a GPU."
    yield from (
        "Loads, stores, tensor core, async copy: instructions in the machine code, not as executed. Loads and stores are of global",
        "memory, by the bits that one moves for a thread, as in 8x128; async copies are LDGSTS or UTMALDG.",
        "Warps: how many a multiprocessor holds at once, of 64.",
        "Sizes: those that 16 divides, as those of models are, or any: there spills are only listed.",
    )
    yield ""
    yield from aot_table.render(rows(judged))


@cache
def triton_minor() -> str:
    """The running Triton's minor version, such as "3.9"."""
    return ".".join(triton.__version__.split(".")[:2])


def gate(jobs: int) -> Judged:
    """Every entry with its resources and what is against it."""
    listed = entries()
    different = list({entry.compiled: entry for entry in listed}.values())
    # Processes of their own: compilation holds the interpreter's lock.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        found = dict(zip((entry.compiled for entry in different), pool.map(judge, different), strict=True))
    return [(entry, *found[entry.compiled]) for entry in listed]


def against_table(committed: str, judged: Judged) -> list[str]:
    """What became worse than the committed table, then whether it is out of date.

    Other versions of Triton make other code, so for those only the limits count.
    """
    if f"Triton {triton_minor()}, bf16" not in committed:
        return []
    before, after = committed.splitlines(), render(judged).splitlines()
    changed = [f"- {line}" for line in before if line not in after] + [f"+ {line}" for line in after if line not in before]
    stale = ["the table is out of date, write it anew with --write:", *changed] if changed else []
    return aot_table.worse(aot_table.parse(committed), rows(judged)) + stale


def main() -> None:
    """Exit with 1 and a line for each problem when a kernel is refused or became worse, or the committed table is out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="write the table there, and say what became worse than the one that was there")
    parser.add_argument("--check", type=Path, help="compare with the table there")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    given = parser.parse_args()
    judged = gate(given.jobs)
    problems = [f"{e.kernel} {dict(e.config)} for {e.arch}: {problem}" for e, _, against in judged for problem in against]
    if given.write is not None:
        before = aot_table.parse(given.write.read_text(encoding="utf-8")) if given.write.exists() else []
        for line in aot_table.worse(before, rows(judged)):
            sys.stderr.write(f"written all the same: {line}\n")
        given.write.write_text(render(judged), encoding="utf-8")
    elif given.check is None:
        sys.stdout.write(render(judged))
    else:
        problems += against_table(given.check.read_text(encoding="utf-8"), judged)
    for problem in problems:
        sys.stderr.write(problem + "\n")
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
