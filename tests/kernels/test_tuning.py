"""The tables of configurations."""

import ast
import json
from pathlib import Path

import pytest
import torch
import triton

from fastllava_kernels._tuning import aot, tune, tuning

RUNNING = aot.triton_minor()


def kernels_of(package: Path) -> set[str]:
    """Every function decorated with triton.jit that no other calls as a function: what is launched."""
    decorated, called = set(), set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                decorated.add(node.name)
                inner = [call.func.id for call in ast.walk(node) if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)]
                called |= set(inner)
    return decorated - called


def test_every_kernel_that_is_launched_is_described(repo: Path) -> None:
    launched = kernels_of(repo / "kernels" / "fastllava_kernels")
    assert "_loss_row" in launched
    assert launched == {kernel.function.fn.__name__ for kernel in tuning.kernels().values()}


@pytest.mark.parametrize("arch", ["interpreter", *aot.ARCHITECTURES])
def test_a_sum_has_one_norm_whichever_room_norms_it(arch: str) -> None:
    """Backward norms the sums of add_rms_norm again by rms_norm: another number of warps would add in another order."""
    found = {
        room: [entry for kernel, *entry in tuning.configurations(arch) if kernel == f"{room}.forward"]
        for room in ("rms_norm", "add_rms_norm")
    }
    assert found["rms_norm"] == found["add_rms_norm"], f"tables/{arch}.json: give both kernels the same entries"


@pytest.mark.parametrize("arch", ["interpreter", *aot.ARCHITECTURES])
def test_every_kernel_has_a_configuration_and_no_table_repeats_a_first_candidate(arch: str) -> None:
    found = list(tuning.configurations(arch))
    assert {kernel for kernel, *_ in found} == set(tuning.kernels())
    for kernel, _, _, config in found:
        assert config in tuning.kernels()[kernel].candidates[arch], "an entry that the code does not offer"
    for name in tuning.read_table(arch):
        first = tuning.kernels()[name].candidates[arch][0]
        assert any(kernel == name and config != first for kernel, _, _, config in found), "a kernel that the table need not have"


@pytest.mark.parametrize("kernel", tuning.kernels().values(), ids=tuning.kernels())
def test_a_kernel_names_its_room_and_a_size_of_its_workload(kernel: tuning.Kernel) -> None:
    assert kernel.rows in next(iter(tune.shapes(kernel.room, tune.SIZE).values()))


OP = tuning.Kernel("op.forward", None, {}, {}, {"interpreter": [{"B": 77}]}, "rows")
TABLE = {"op.forward": {"3.6": {"1024": {"B": 1}, "4096": {"B": 2}, "any": {"B": 3}}, "3.8": {"any": {"B": 4}}}}


@pytest.mark.parametrize(
    ("version", "rows", "wanted"),
    [("3.6.0", 1, 1), ("3.6.0", 1024, 1), ("3.6.2", 1025, 2), ("3.7.1", 4097, 3), ("3.8.0", 5, 4), ("3.10.0", 5, 4), ("3.5.0", 5, 1)],
)
def test_which_entry_is_taken(monkeypatch: pytest.MonkeyPatch, version: str, rows: int, wanted: int) -> None:
    monkeypatch.setattr(tuning, "read_table", lambda arch: TABLE)
    monkeypatch.setattr(tuning, "_buckets", tuning._buckets.__wrapped__)
    monkeypatch.setattr(triton, "__version__", version)
    assert tuning.config(OP, rows, torch.device("cpu"))["B"] == wanted


def test_without_any_the_largest_bucket_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "read_table", lambda arch: {"op.forward": {"3.6": {"16": {"B": 1}, "128": {"B": 2}}}})
    monkeypatch.setattr(tuning, "_buckets", tuning._buckets.__wrapped__)
    assert tuning.config(OP, 1000, torch.device("cpu"))["B"] == 2


@pytest.mark.parametrize("table", [{}, {"other.forward": {"3.6": {"any": {"B": 1}}}}])
def test_a_kernel_that_the_table_leaves_out_runs_with_its_first_candidate(
    monkeypatch: pytest.MonkeyPatch, table: dict[str, object]
) -> None:
    monkeypatch.setattr(tuning, "read_table", lambda arch: table)
    monkeypatch.setattr(tuning, "_buckets", tuning._buckets.__wrapped__)
    assert tuning.config(OP, 1000, torch.device("cpu")) == {"B": 77, **tuning.FUSION}


def test_a_table_with_a_kernel_that_the_code_has_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "read_table", lambda arch: {"rope.gone": {}})
    with pytest.raises(ValueError, match=r"tables/sm_90.json has rope.gone, which the code has not: run the tuner"):
        list(tuning.configurations("sm_90"))


def test_an_override_ends_with_its_block() -> None:
    name, kernel = next(iter(tuning.kernels().items()))
    before = tuning.config(kernel, 1, torch.device("cpu"))
    with tuning.override(name, {"num_warps": 77}):
        assert tuning.config(kernel, 1, torch.device("cpu"))["num_warps"] == 77
    assert tuning.config(kernel, 1, torch.device("cpu")) == before


def test_a_written_table_keeps_what_other_versions_say_and_nothing_that_the_code_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name, kernel), (other, _) = list(tuning.kernels().items())[:2]
    first = dict(kernel.candidates["sm_90"][0])
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    (tmp_path / "sm_90.json").write_text(json.dumps({name: {"1.0": {"any": {"num_warps": 2}}}, "gone": {}}))
    tune.write("sm_90", {name: {"any": first}, other: {"any": tuning.kernels()[other].candidates["sm_90"][0]}})
    table = json.loads((tmp_path / "sm_90.json").read_text())
    assert table == {name: {"1.0": {"any": {"num_warps": 2}}, RUNNING: {"any": first}}}
    (tmp_path / "sm_90.json").write_text("{}")
    tune.write("sm_90", {name: {"any": first}})
    assert json.loads((tmp_path / "sm_90.json").read_text()) == {}
