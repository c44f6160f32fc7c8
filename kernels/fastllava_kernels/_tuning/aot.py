"""Compile every Triton kernel with every configuration it may have for A100 and H100, without a GPU, and judge the result.

    python -m fastllava_kernels._tuning.aot [--write FILE | --check FILE]

What is looked at is what ptxas and cuobjdump say of the machine code: spills, registers, shared memory, tensor-core and
asynchronous-copy instructions. The table is committed, so that a regression shows in a diff.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
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
from fastllava_kernels._tuning import tuning

ARCHITECTURES = {"sm_80": 80, "sm_90": 90}
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
"""Bytes a block may have (CUDA C++ programming guide, "Technical specifications per compute capability")."""
REGISTER_FILE = 65536
"""32-bit registers of a multiprocessor, which one block may fill."""
NVIDIA_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

TENSOR_CORE = ("HMMA", "HGMMA")
ASYNC_COPY = ("LDGSTS", "UTMALDG")
SPILL = ("LDL", "STL")


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes; instructions are counted in the machine code, not as executed."""

    registers: int
    """Registers of a thread."""
    shared: int
    """Bytes of shared memory of a block."""
    spilled: int
    """Bytes of stack per thread, plus loads and stores of local memory."""
    tensor_core: int
    async_copy: int

    def problems(self, arch: str, warps: int, matmul: bool) -> list[str]:
        """What the gate refuses, in words; nothing when all is well."""
        found = []
        if self.spilled:
            found.append(f"spills ({self.spilled})")
        if self.shared > SHARED_MEMORY[arch]:
            found.append(f"{self.shared} bytes of shared memory, {SHARED_MEMORY[arch]} are there")
        if self.registers * 32 * warps > REGISTER_FILE:
            found.append(f"{self.registers} registers a thread in {warps} warps, {REGISTER_FILE} in all are there")
        if matmul and not self.tensor_core:
            found.append("no tensor-core instruction")
        if matmul and not self.async_copy:
            found.append("no asynchronous copy")
        return found


def compile_kernel(kernel: tuning.Kernel, config: tuning.Config, arch: str) -> Resources:
    """The resources of `kernel` in `config` for "sm_80" or "sm_90"."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 leaves nothing to compile; unset it")
    constants = dict(kernel.constants) | {key: value for key, value in config.items() if key not in ("num_warps", "num_stages")}
    names = kernel.function.arg_names
    unknown = set(names) ^ (set(constants) | set(kernel.signature))
    if unknown:
        raise ValueError(f"{kernel.name}: {', '.join(sorted(unknown))} is in its parameters or in its description, not in both")
    aligned = {name for name, kind in kernel.signature.items() if kind.startswith("*")} | kernel.divisible
    source = ASTSource(
        kernel.function,
        signature={name: "constexpr" if name in constants else kernel.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {key: config[key] for key in ("num_warps", "num_stages")} | tuning.FUSION
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURES[arch], 32), options=options)
    return _measured(compiled.asm["cubin"], compiled.metadata.shared)


def _measured(cubin: bytes, shared: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("--dump-resource-usage", "-sass"))
    taken = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    # An instruction's line: /*0a10*/  @!P0 LDGSTS.E.BYPASS ... ;
    found = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", code, re.MULTILINE))
    if not found or "REG" not in taken:
        raise RuntimeError("cuobjdump printed no code that could be read")

    def count(names: tuple[str, ...]) -> int:
        return sum(found[name] for name in names)

    return Resources(taken["REG"], shared, taken["STACK"] + taken["LOCAL"] + count(SPILL), count(TENSOR_CORE), count(ASYNC_COPY))


def _cuobjdump(option: str, file: str) -> str:
    return subprocess.run([NVIDIA_BIN / "cuobjdump", option, file], capture_output=True, text=True, check=True).stdout  # noqa: S603 (a path of our own)


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    kernel: str
    arch: str
    tuned: str
    """The Triton minor version that a table's entry was chosen with, or tuning.FIRST."""
    bucket: str
    config: tuple[tuple[str, int], ...]


def entries() -> list[Entry]:
    """Every configuration of every kernel on every architecture."""
    found = [
        Entry(kernel, arch, tuned, bucket, tuple(config.items()))
        for arch in ARCHITECTURES
        for kernel, tuned, bucket, config in tuning.configurations(arch)
    ]
    return sorted(found, key=lambda entry: (entry.kernel, entry.arch, entry.tuned, entry.bucket))


def judge(entry: Entry) -> tuple[Entry, Resources, list[str]]:
    """The entry's resources, and what the gate has against them."""
    kernel, config = tuning.kernels()[entry.kernel], dict(entry.config)
    resources = compile_kernel(kernel, config, entry.arch)
    return entry, resources, resources.problems(entry.arch, config["num_warps"], kernel.matmul)


def render(judged: list[tuple[Entry, Resources, list[str]]]) -> str:
    """The table in Markdown."""
    return "\n".join(_lines(judged)) + "\n"


def _lines(judged: list[tuple[Entry, Resources, list[str]]]) -> Iterator[str]:
    yield "# Compiled ahead of time"
    yield ""
    command = "python -m fastllava_kernels._tuning.aot --write kernels/aot.md"
    yield f"By `{command}`, Triton {triton_minor()}, bf16; nothing here was measured on a GPU."
    yield "Tensor core and async copy: instructions in the machine code (HMMA or HGMMA; LDGSTS or UTMALDG)."
    yield ""
    yield "| kernel | arch | tuned with | rows up to | configuration | registers | shared bytes | spills | tensor core | async copy |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for entry, r, _ in judged:
        config = " ".join(f"{key}={value}" for key, value in entry.config)
        head = f"| {entry.kernel} | {entry.arch} | {entry.tuned} | {entry.bucket} | {config} "
        yield head + f"| {r.registers} | {r.shared} | {r.spilled} | {r.tensor_core} | {r.async_copy} |"


@cache
def triton_minor() -> str:
    """The running Triton's minor version, such as "3.9"."""
    return ".".join(triton.__version__.split(".")[:2])


def gate(jobs: int) -> tuple[str, list[str]]:
    """The table, and every problem in a line."""
    # Processes of their own: compilation holds the interpreter's lock.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        judged = list(pool.map(judge, entries()))
    problems = [f"{e.kernel} {dict(e.config)} for {e.arch}: {problem}" for e, _, against in judged for problem in against]
    return render(judged), problems


def _differences(committed: str, now: str) -> list[str]:
    """Return the lines that changed; other versions of Triton make other code, so then only the limits count."""
    if f"Triton {triton_minor()}, bf16" not in committed:
        return []
    before, after = committed.splitlines(), now.splitlines()
    return [f"- {line}" for line in before if line not in after] + [f"+ {line}" for line in after if line not in before]


def main() -> None:
    """Exit with 1 and a line for each problem when a kernel is refused or the committed table is out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="write the table there")
    parser.add_argument("--check", type=Path, help="compare with the table there")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    given = parser.parse_args()
    table, problems = gate(given.jobs)
    if given.write is not None:
        given.write.write_text(table, encoding="utf-8")
    elif given.check is None:
        sys.stdout.write(table)
    else:
        changed = _differences(given.check.read_text(encoding="utf-8"), table)
        problems += [f"{given.check} is out of date, write it anew with --write:", *changed] if changed else []
    for problem in problems:
        sys.stderr.write(problem + "\n")
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
