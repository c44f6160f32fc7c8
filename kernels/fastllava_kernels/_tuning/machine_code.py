"""What the machine code of a Triton kernel shows: registers, spills, how wide it loads and stores, its tensor-core instructions.

Read from what cuobjdump prints, which ships inside the triton package. Instructions are counted in the code, not as executed.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import triton

NVIDIA_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor has, and in what portions (CUDA C++ programming guide, "Technical specifications per compute capability")."""

    shared: int
    """Bytes of shared memory."""
    shared_of_block: int
    """Bytes that one block may have of it."""
    registers: int = 65536
    """32-bit registers, which one block may fill."""
    warps: int = 64
    blocks: int = 32


MULTIPROCESSORS = {"sm_80": Multiprocessor(164 * 1024, 163 * 1024), "sm_90": Multiprocessor(228 * 1024, 227 * 1024)}
_REGISTER_PORTION = 256
"""Registers are given to a warp in portions of this size, and warps of a block in fours (CUDA's occupancy calculator)."""
_SHARED_PORTION = 128
_SHARED_OF_SYSTEM = 1024
"""Bytes of shared memory that the system takes beside each block's own."""

_ASYNC_COPY = ("LDGSTS", "UTMALDG")
_SPILL = ("LDL", "STL")
_LOADS, _STORES = ("LDG", "LDGSTS", "LD"), ("STG", "ST")
TMA = 1024
"""The width that stands for a bulk copy, which moves whole rows of a tile: wider than any instruction of a thread."""

# An instruction's line: /*0a10*/  @!P0 LDGSTS.E.BYPASS.128 ... ; what stands behind @!PT never runs.
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P[0-9T] )?(?<!@!PT )([A-Z][A-Za-z0-9_.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes of a GPU."""

    registers: int
    """Registers of a thread."""
    shared: int
    """Bytes of shared memory of a block."""
    spilled: int
    """Bytes of stack per thread, plus loads and stores of local memory."""
    loads: Mapping[int, int]
    """Instructions that load from global memory, asynchronous copies among them, by the bits that each moves for a thread."""
    stores: Mapping[int, int]
    products: Mapping[str, int]
    """Tensor-core instructions by name and shape, such as "HGMMA.64x128x16"."""
    async_copy: int
    """Asynchronous copies: LDGSTS or UTMALDG."""

    def warps_resident(self, arch: str, warps: int) -> int:
        """How many warps a multiprocessor holds at once, for blocks of `warps` warps; 0 where not even one block fits."""
        has = MULTIPROCESSORS[arch]
        of_warp = _up(self.registers * 32, _REGISTER_PORTION)
        by_registers = has.registers // of_warp // 4 * 4 // warps
        by_shared = has.shared // (_up(self.shared, _SHARED_PORTION) + _SHARED_OF_SYSTEM)
        return warps * min(by_registers, by_shared, has.warps // warps, has.blocks)

    def problems(self, arch: str, warps: int, matmul: bool, aligned: bool = True) -> list[str]:
        """What the gate refuses, in words; nothing when all is well.

        aligned: compiled for sizes that 16 divides, as those of models are; for others it may spill and copy as it can.
        """
        found = []
        if self.spilled and aligned:
            found.append(f"spills ({self.spilled})")
        if self.shared > (there := MULTIPROCESSORS[arch].shared_of_block):
            found.append(f"{self.shared} bytes of shared memory, {there} are there")
        elif not self.warps_resident(arch, warps):
            found.append(f"{self.registers} registers a thread in {warps} warps, {MULTIPROCESSORS[arch].registers} in all are there")
        wanted = "HGMMA" if arch == "sm_90" else "HMMA"
        if matmul and not any(name.startswith(wanted) for name in self.products):
            found.append(f"no tensor-core instruction {wanted}")
        if matmul and aligned and not self.async_copy:
            found.append("no asynchronous copy")
        return found


def bits(accesses: Mapping[int, int]) -> int:
    """The width that moves most of the bytes, 0 where nothing moves: a few narrow accesses, such as of an index, do not count."""
    return max(accesses, key=lambda width: (width * accesses[width], width), default=0)


def read(cubin: bytes, shared: int) -> Resources:
    """The resources of a compiled kernel with `shared` bytes of shared memory. Raises RuntimeError where nothing can be read."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [NVIDIA_BIN / "cuobjdump", "--dump-resource-usage", "-sass", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603 (a path of our own)
    return parse(said, shared)


def parse(said: str, shared: int) -> Resources:
    """The resources in what cuobjdump says."""
    taken = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    instructions = Counter(_INSTRUCTION.findall(said))
    if not instructions or "REG" not in taken:
        raise RuntimeError("cuobjdump printed no code that could be read")
    by_name: Counter[str] = Counter()
    loads, stores, products = Counter[int](), Counter[int](), Counter[str]()
    for instruction, count in instructions.items():
        name, *suffixes = instruction.split(".")
        by_name[name] += count
        if name in ("HMMA", "HGMMA"):
            products[".".join((name, *suffixes[:1]))] += count
        for names, bulk, accesses in ((_LOADS, "UTMALDG", loads), (_STORES, "UTMASTG", stores)):
            if name in names or name == bulk:
                accesses[TMA if name == bulk else _width(suffixes)] += count
    spilled = taken["STACK"] + taken["LOCAL"] + sum(by_name[name] for name in _SPILL)
    return Resources(taken["REG"], shared, spilled, loads, stores, products, sum(by_name[name] for name in _ASYNC_COPY))


def _width(suffixes: list[str]) -> int:
    """Bits of an access: 32 where the instruction says nothing else, such as .U16 or .128."""
    for width in (8, 16, 64, 128, 256):
        if {str(width), f"U{width}", f"S{width}"} & set(suffixes):
            return width
    return 32


def _up(size: int, portion: int) -> int:
    return -(-size // portion) * portion
