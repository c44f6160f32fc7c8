"""How rooms are found and chosen: what is asked for by name runs or is refused, never replaced."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastllava_kernels import Implementation, Room, choose, rooms
from fastllava_kernels._tuning import tuning
from fastllava_kernels.room import Sizes

COMPOSED = {"projector_splice": ("projector_mlp", "splice")}
"""Rooms whose reference is made of others'."""
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def first(x: int) -> int:
    return x


def second(x: int) -> int:
    return -x


def only_on_gpu(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "needs a GPU"
    return None if dtype == torch.bfloat16 else f"has no {dtype} kernel"


ROOM = Room("op", "An op", {"fast": Implementation(first, only_on_gpu), "reference": Implementation(second)})


@pytest.mark.parametrize(
    ("wanted", "device", "dtype", "chosen"),
    [
        ("auto", GPU, torch.bfloat16, "fast"),
        ("auto", GPU, torch.float32, "reference"),
        ("auto", CPU, torch.bfloat16, "reference"),
        ("fast", GPU, torch.bfloat16, "fast"),
        ("reference", GPU, torch.bfloat16, "reference"),
        ("reference", CPU, torch.float32, "reference"),
    ],
)
def test_choice(wanted: str, device: torch.device, dtype: torch.dtype, chosen: str) -> None:
    assert choose(ROOM, wanted, device, dtype) == chosen


@pytest.mark.parametrize(
    ("device", "dtype", "reason"), [(CPU, torch.bfloat16, "needs a GPU"), (GPU, torch.float32, "has no torch.float32 kernel")]
)
def test_what_cannot_run_is_refused_with_the_reason_and_the_remedy(device: torch.device, dtype: torch.dtype, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"kernels.op: 'fast' cannot run here ({reason}); write kernels.op=auto")):
        choose(ROOM, "fast", device, dtype)


def no_wider_than_64(sizes: Sizes) -> str | None:
    return next((f"its heads are {width} wide" for width in sizes.head_widths.values() if width > 64), None)


@pytest.mark.parametrize(("width", "chosen"), [(64, "narrow"), (100, "reference")])
def test_auto_passes_on_from_what_cannot_run_the_model(width: int, chosen: str) -> None:
    room = Room("op", "An op", {"narrow": Implementation(first, unfit=no_wider_than_64), "reference": Implementation(second)})
    sizes = Sizes({"model.llm": 32, "model.vision_tower": width})
    assert choose(room, "auto", CPU, torch.float32, sizes=sizes) == chosen
    if chosen != "narrow":
        with pytest.raises(ValueError, match=re.escape("'narrow' cannot run here (its heads are 100 wide); write kernels.op=auto")):
            choose(room, "narrow", CPU, torch.float32, sizes=sizes)


@pytest.mark.parametrize(("width", "flash"), [(128, True), (80, True), (96, True), (256, True), (100, False), (36, False), (264, False)])
@pytest.mark.parametrize("part", ["model.llm", "model.vision_tower"])
def test_flash_attention_is_for_heads_that_it_takes(part: str, width: int, flash: bool) -> None:
    sizes = Sizes({"model.llm": 64, "model.vision_tower": 64} | {part: width})
    for name, one in rooms()["attention"].implementations.items():
        takes = name in ("reference", "sdpa") or (flash and (width <= 128 or name != "fa4"))
        assert (one.unfit(sizes) is None) == takes
        if not takes:
            assert f"those of {part} are {width} wide" in str(one.unfit(sizes))


def test_every_room_has_a_contract() -> None:
    assert all(room.contract is not None for room in rooms().values())


def test_unknown_implementation_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match=re.escape("kernels.op: no implementation 'triton'; write one of auto, fast, reference")):
        choose(ROOM, "triton", CPU, torch.float32)


def test_a_room_without_reference_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="room op: no implementation named 'reference'"):
        Room("op", "An op", {"fast": Implementation(first)})


def test_rooms_are_the_folders(repo) -> None:
    folders = sorted(path.parent.name for path in (repo / "kernels" / "fastllava_kernels").glob("[!_]*/__init__.py"))
    assert list(rooms()) == folders
    assert len(folders) >= 8
    for name, room in rooms().items():
        assert room.name == name
        assert room.summary
        assert "\n" not in room.summary


@pytest.mark.parametrize("name", rooms())
def test_a_room_s_files_are_named_as_the_op_is_found(repo, name: str) -> None:
    """One word leads to everything: folder, reference and function, config word and file have one name; no file shadows triton."""
    folder = repo / "kernels" / "fastllava_kernels" / name
    assert f"def {name}(" in (folder / "reference.py").read_text(encoding="utf-8")
    assert not (folder / "triton.py").exists()
    words = {path.name.removesuffix("_op.py") for path in folder.glob("*_op.py")}
    assert sorted(rooms()[name].implementations) == sorted({"reference"} | words)


@pytest.mark.parametrize("name", rooms())
def test_a_room_s_kernels_are_named_after_it(name: str) -> None:
    """In the tables, in aot.md and in results; a room with an implementation `triton` has some."""
    own = [kernel for kernel in tuning.kernels() if kernel.startswith(f"{name}.")]
    assert bool(own) == ("triton" in rooms()[name].implementations)


def test_names_are_known_without_torch() -> None:
    """A config, `--help` and `--version` need the names only."""
    code = (
        "import sys; from fastllava_kernels import rooms; "
        "print({name: (room.summary, *room.implementations, 'auto' in room.implementations) for name, room in rooms().items()}); "
        "print(sorted({'torch', 'triton', 'numpy'} & sys.modules.keys()))"
    )
    said, imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert ast.literal_eval(said) == {name: (room.summary, *room.implementations, False) for name, room in rooms().items()}
    assert imported == "[]"


def test_an_implementation_is_imported_when_it_is_asked_for_and_no_other() -> None:
    code = (
        "import sys; from fastllava_kernels import rooms; rooms()['swiglu'].implementations['reference']; "
        "print(sorted(name for name in sys.modules if name.startswith('fastllava_kernels.swiglu.')))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(ran.stdout) == ["fastllava_kernels.swiglu.reference"]


def test_a_name_that_is_no_implementation_is_none_of_the_mapping() -> None:
    found = rooms()["swiglu"].implementations
    assert "kernel_swiglu" not in found
    with pytest.raises(KeyError, match="fast"):
        found["fast"]
    assert len(found) == len(list(found)) == 4


@pytest.mark.parametrize("name", rooms())
def test_references_run_anywhere(name: str) -> None:
    for device in (CPU, GPU):
        for dtype in (torch.float32, torch.bfloat16):
            assert choose(rooms()[name], "reference", device, dtype) == "reference"


def imported_by(folder: Path) -> set[str]:
    """Every module that a file of the folder names in an import, also as `from package import module`."""
    imported = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level > 1:
                imported.add(f"{'.' * node.level}{node.module or ''}")
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
    return imported


@pytest.mark.parametrize("name", [*rooms(), "_device", "_tuning"])
def test_no_room_knows_another_and_what_they_share_knows_none(repo, name: str) -> None:
    """An op that is two others, one after the other, is specified by their references: that alone goes from room to room."""
    imported = imported_by(repo / "kernels" / "fastllava_kernels" / name)
    assert not [module for module in imported if module.startswith("..")], "rooms are imported by their whole name or not at all"
    assert name not in rooms() or "fastllava_kernels.room" in imported
    others = [f"fastllava_kernels.{other}" for other in rooms() if other != name]
    met = {module for module in imported if any(module == other or module.startswith(f"{other}.") for other in others)}
    references = tuple(f"fastllava_kernels.{other}.reference" for other in COMPOSED.get(name, ()))
    assert not [module for module in met if not module.startswith(references)]


def test_rooms_open_without_triton() -> None:
    """Triton is there on Linux only; elsewhere the other implementations train."""
    code = (
        "import sys; sys.modules['triton'] = None; from fastllava_kernels import rooms; "
        "print(sum(callable(one.function) for room in rooms().values() for one in room.implementations.values()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == str(sum(len(room.implementations) for room in rooms().values())), ran.stderr
