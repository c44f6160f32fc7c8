"""`fastllava bench kernels` on tiny shapes: complete rows, nothing wrong is timed, charts and table from the results."""

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from benches import ceilings, cli, kernels, report
from benches.lib import judging, results, timing, world
from benches.peers import rooms as kernel_peers
from fastllava.cli import app
from fastllava.errors import UserError
from fastllava_kernels import Implementation, Room, rooms
from fastllava_kernels._device.launch import INTERPRETED
from fastllava_kernels.room import REFERENCE
from fastllava_kernels.workload import Cost

CPU = torch.device("cpu")
REPO = Path(__file__).resolve().parents[2]
COMPILED = {"compiled"}
"""Implementations that start a C++ compiler on a CPU; their rooms' own tests run them."""

KEYS = {
    *("room", "implementation", "shape", "dtype", "pass", "ms_p20", "ms_p50", "ms_p80", "peak_bytes", "floor_share", "error"),
    *("reference_error", "device", "versions", "commit", "dirty", "driver", "power_limit_watts", "void", "peer"),
    *("floor_ms", "flops", "bytes", "matmul_ceiling_tflops", "copy_ceiling_gbs", "host_us", "host_bound"),
}
TIMES = ("ms_p20", "ms_p50", "ms_p80", "peak_bytes", "floor_share")


def plan(which: dict[str, Room], **changes: Any) -> Any:
    return kernels.Plan(which, CPU, "fp32", **{"seconds": 0.0} | changes)


def names_of(room: Room) -> set[str]:
    return set(plan({room.name: room}).candidates(room))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """The rows of every room on a CPU, and the file that they were appended to."""
    out = tmp_path_factory.mktemp("bench") / "deep" / "rows.jsonl"
    every = sorted(set().union(*map(names_of, rooms().values())) - COMPILED)
    return kernels.bench(plan(rooms(), implementations=every), results.Sheet(out)), out


def test_every_room_shape_and_implementation_has_its_rows(measured) -> None:
    rows, out = measured
    found = {(row["room"], row["shape"], row["implementation"], row["pass"]) for row in rows}
    assert len(found) == len(rows)
    for name, room in rooms().items():
        for shape in (shape for shape in room.workload.shapes if shape.startswith("tiny")):
            learns = judging.leaves(room.workload.inputs(room.workload.shapes[shape], torch.float32, CPU, 0))
            for implementation in names_of(room) - COMPILED:
                passes = {key[3] for key in found if key[:3] == (name, shape, implementation)}
                assert passes == ({"forward", "backward", "both"} if learns else {"forward"})
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows


def test_rows_are_complete(measured) -> None:
    for row in measured[0]:
        assert set(row) == KEYS
        assert row["floor_ms"] > 0
        assert row["bytes"] > 0
        assert row["versions"]["torch"] == importlib.metadata.version("torch")
        assert row["device"].startswith("CPU ")
        if row["void"] is not None:
            assert row["void"].startswith("cannot run here: ")
            assert all(row[key] is None for key in TIMES)
            continue
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["peak_bytes"] > 0
        assert row["floor_share"] == pytest.approx(row["floor_ms"] / row["ms_p50"])
        if row["implementation"] == "gemms":
            assert row["error"] is None
        else:
            assert 0 <= row["error"] <= row["reference_error"] + 1e-6


def test_what_runs_on_a_cpu_was_timed(measured) -> None:
    timed = {(row["room"], row["implementation"]) for row in measured[0] if row["void"] is None}
    assert timed >= {(room, REFERENCE) for room in rooms()}
    # PyTorch 2.11 has no chunked loss.
    losses = ["chunked_nll", *(["torch_flce"] if hasattr(torch.nn, "LinearCrossEntropyOptions") else [])]
    assert timed >= {("masked_linear_cross_entropy", peer) for peer in losses}
    assert timed >= {("projector_splice", peer) for peer in ("masked_scatter", "gemms")}
    assert results.failures(measured[0]) == []


def test_both_costs_what_its_parts_cost(measured) -> None:
    loss = [row for row in measured[0] if row["room"] == "masked_linear_cross_entropy" and row["implementation"] == REFERENCE]
    flops = {row["pass"]: row["flops"] for row in loss if row["shape"] == "tiny-head"}
    assert flops["both"] == flops["forward"] + flops["backward"] == 3 * flops["forward"]


@pytest.fixture
def _known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring them takes two seconds."""
    monkeypatch.setattr(kernels, "measure", lambda device, dtype, seconds: ceilings.Ceilings(matmul_tflops=0.1, copy_gbs=10.0))


def with_one_more(room: str, function: Any) -> dict[str, Room]:
    """A room with the reference and another implementation of it."""
    found = rooms()[room]
    two = {REFERENCE: found.implementations[REFERENCE], "other": Implementation(function)}
    return {room: dataclasses.replace(found, implementations=two)}


def void_of(room: str, function: Any) -> dict[str, Any]:
    """By pass, why the implementation has no time; None when it has."""
    rows = kernels.bench(plan(with_one_more(room, function), implementations=[REFERENCE, "other"], sizes=["tiny"]), results.Sheet())
    assert all(row["void"] is None for row in rows if row["implementation"] == REFERENCE)
    mine = [row for row in rows if row["implementation"] == "other"]
    assert all((row["ms_p50"] is None) == (row["void"] is not None) for row in mine)
    assert bool(results.failures(rows)) == any(row["void"] and "memory" not in row["void"] for row in mine)
    return {row["pass"]: row["void"] for row in mine}


@pytest.mark.usefixtures("_known_ceilings")
def test_wrong_output_is_void() -> None:
    found = void_of("swiglu", lambda gate, up: torch.nn.functional.silu(gate) * up * (1 + 1e-5))
    assert found["forward"].startswith("wrong: ")
    assert "from fp64 truth" in found["both"]


class HalfGradient(torch.autograd.Function):
    """swiglu with the right value and a wrong gradient of `up`."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        gate_share = torch.sigmoid(gate)
        return upstream[0] * up * gate_share * (1 + gate * (1 - gate_share)), upstream[0] * gate


@pytest.mark.usefixtures("_known_ceilings")
def test_wrong_gradient_voids_backward_and_leaves_forward() -> None:
    found = void_of("swiglu", HalfGradient.apply)
    assert found["forward"] is None
    assert found["backward"].startswith("wrong: ")
    assert found["both"].startswith("wrong: ")


@pytest.mark.usefixtures("_known_ceilings")
def test_leaf_without_gradient_is_void() -> None:
    found = void_of("swiglu", lambda gate, up: torch.nn.functional.silu(gate) * up.detach())
    assert found == {"forward": None, "backward": found["backward"], "both": found["both"]}
    assert found["backward"].startswith("wrong: inf")


@pytest.mark.usefixtures("_known_ceilings")
def test_not_a_number_is_void() -> None:
    assert void_of("quick_gelu", lambda x: x * math.nan)["forward"].startswith("wrong: inf")


@pytest.mark.usefixtures("_known_ceilings")
def test_out_of_memory_is_void_and_no_failure() -> None:
    def hungry(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    assert set(void_of("swiglu", hungry).values()) == {"out of memory"}


@pytest.mark.usefixtures("_known_ceilings")
def test_what_breaks_is_void_with_its_first_line() -> None:
    def broken(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such tile\nand a long explanation")

    assert set(void_of("swiglu", broken).values()) == {"broke: RuntimeError: no such tile"}


@pytest.mark.parametrize("room", ["projector_splice", "projector_mlp"])
def test_gemms_do_the_products_and_no_more(room: str) -> None:
    workload = rooms()[room].workload
    args = workload.inputs(workload.shapes["tiny"], torch.float32, CPU, 0)
    bound = kernel_peers.peers(rooms()[room])["gemms"].build(args)
    with FlopCounterMode(display=False) as counter:
        judging.run(bound.function, bound.leaves)
    assert counter.get_total_flops() == kernels.cost_of(rooms()[room], workload.shapes["tiny"], torch.float32, "both").flops


def test_floor_is_the_longer_of_products_and_copies() -> None:
    found = ceilings.Ceilings(matmul_tflops=2.0, copy_gbs=100.0)
    assert found.floor_ms(Cost(flops=4e12, bytes=1e9)) == pytest.approx(2000.0)
    assert found.floor_ms(Cost(flops=4e9, bytes=1e9)) == pytest.approx(10.0)


def test_charts_show_every_room(measured, tmp_path: Path) -> None:
    written = report.kernels_charts(measured[0], tmp_path)
    assert {path.stem for path in written} == set(rooms())
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_chart_of_two_and_of_many_bars_differ_in_height(measured, tmp_path: Path) -> None:
    base = next(row for row in measured[0] if row["room"] == "swiglu" and row["void"] is None)
    many = [base | {"shape": f"7b-{i}", "implementation": f"i{j}", "pass": "both"} for i in range(4) for j in range(5)]
    heights = []
    for rows in ([base | {"pass": "both"}], many):
        (path,) = report.kernels_charts(rows, tmp_path)
        heights.append(int.from_bytes(path.read_bytes()[20:24], "big"))
    assert heights[1] > 3 * heights[0]


def test_nothing_timed_gives_no_chart(measured, tmp_path: Path) -> None:
    assert report.kernels_charts([row for row in measured[0] if row["void"] is not None][:3], tmp_path) == []


def test_table_shows_times_and_says_what_has_none(measured, tmp_path: Path) -> None:
    for row in measured[0]:
        results.append(tmp_path / "kernels_here.jsonl", row)
    text = report.KERNELS.table(tmp_path)
    assert "says nothing about a GPU" in text
    assert "| swiglu | tiny | reference | forward, backward |" in text
    assert "| quick_gelu | tiny | reference | forward |" in text
    assert "a lower bound" in text
    assert "- cannot run here: the package quack is not installed: masked_linear_cross_entropy quack" in text


def test_table_without_results_says_so(tmp_path: Path) -> None:
    assert report.KERNELS.table(tmp_path) == "Nothing has been measured yet."


def test_a_table_has_two_marks() -> None:
    with pytest.raises(UserError, match="has no <!-- name: end --> after it"):
        report.between_marks("<!-- name: begin -->\ntext", "name", "generated")


def test_of_rows_measured_twice_the_last_counts(tmp_path: Path) -> None:
    for value, name in ((1, "a"), (2, "b"), (3, "a")):
        results.append(tmp_path / "rows.jsonl", {"name": name, "value": value})
    assert results.latest(tmp_path / "rows.jsonl", ["name"]) == [{"name": "a", "value": 3}, {"name": "b", "value": 2}]


def test_rows_must_be_strict_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        results.append(tmp_path / "rows.jsonl", {"value": math.nan})


def test_calls_take_turns_and_preparation_is_not_timed() -> None:
    order: list[str] = []

    def slow() -> None:
        time.sleep(0.005)

    def note(name: str, _: Any) -> None:
        order.append(name)

    times = timing.interleaved({name: timing.Call(functools.partial(note, name), slow) for name in "ab"}, CPU, 0.0)
    assert order == ["a", "b"] * (len(order) // 2)
    assert len(order) == 2 * (timing.FEWEST + 1)
    assert times["a"].p50 < 5.0


def test_quantiles() -> None:
    assert timing.Times.of([float(n) for n in range(11)]) == timing.Times(2.0, 5.0, 8.0)


MIB = 2**20


def allocate(count: int) -> torch.Tensor:
    return torch.empty(count * MIB, dtype=torch.int8)


def test_peak_counts_temporaries_and_what_was_prepared() -> None:
    def run(kept: Any) -> torch.Tensor:
        first = allocate(4)
        del first
        return allocate(3)

    assert timing.peak_bytes(timing.Call(run), CPU) == 4 * MIB
    assert timing.peak_bytes(timing.Call(run, lambda: allocate(2)), CPU) == 6 * MIB


def test_peak_sees_inside_custom_ops() -> None:
    """What they allocate is hidden from PyTorch's dispatcher, not from the allocator."""

    @torch.library.custom_op("fastllava_test::hidden", mutates_args=())
    def hidden(x: torch.Tensor) -> torch.Tensor:
        return allocate(5)[: x.numel()].clone()

    assert timing.peak_bytes(timing.Call(lambda _: hidden(torch.zeros(1))), CPU) >= 5 * MIB


def test_world_names_device_commit_and_versions() -> None:
    found = world.world(CPU)
    assert found["device"].startswith("CPU ")
    assert {"python", "torch", "triton"} <= set(found["versions"])
    assert found["commit"] is None or len(found["commit"]) == 40


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["swigloo"], "bench kernels: 'swigloo' is no room; write one of add_rms_norm, attention"),
        (["swiglu", "--sizes", "8b"], "--sizes: '8b' is none of "),
        (["swiglu", "--implementations", "fast"], "--implementations: 'fast' is none of "),
        (["swiglu", "--passes", "sideways"], "--passes: 'sideways' is none of backward, both, forward"),
        (["swiglu", "--dtype", "int8"], "--dtype: 'int8' is none of bf16, fp16, fp32"),
    ],
)
def test_users_mistakes_are_one_line(arguments: list[str], error: str) -> None:
    done = CliRunner().invoke(cli.app, ["kernels", *arguments, "--device", "cpu"])
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith(error)
    assert "\n" not in str(done.exception)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_there_is_an_error() -> None:
    done = CliRunner().invoke(cli.app, ["kernels", "--device", "cuda"])
    assert str(done.exception) == "--device: PyTorch finds no CUDA GPU here; write --device cpu"


@pytest.mark.usefixtures("_known_ceilings")
def test_command_writes_rows_and_charts(tmp_path: Path) -> None:
    arguments = ["rope", "--implementations", REFERENCE, "--passes", "both", "--device", "cpu", "--seconds", "0"]
    done = CliRunner().invoke(cli.app, ["kernels", *arguments, "--out", f"{tmp_path}/r.jsonl", "--charts", f"{tmp_path}/charts"])
    assert done.exit_code == 0, done.output
    (row,) = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert (row["room"], row["shape"], row["pass"], row["void"]) == ("rope", "tiny", "both", None)
    assert (tmp_path / "charts" / "rope.png").is_file()
    assert "rope tiny reference both: " in done.output


@pytest.mark.usefixtures("_known_ceilings")
def test_command_fails_when_one_of_ours_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = with_one_more("quick_gelu", torch.nn.functional.gelu)
    monkeypatch.setattr(kernels, "rooms_named", lambda names: wrong)
    done = CliRunner().invoke(cli.app, ["kernels", "--implementations", "other", "--device", "cpu", "--seconds", "0"])
    assert done.exit_code == 1
    assert "quick_gelu tiny other forward: void, wrong: " in done.output


def test_sizes_choose_shapes_and_equal_shapes_are_measured_once() -> None:
    loss = rooms()["masked_linear_cross_entropy"]
    on_gpu = kernels.Plan({loss.name: loss}, torch.device("cuda"), "bf16")
    assert "tiny" not in on_gpu.shapes(loss)
    assert "7b" not in on_gpu.shapes(loss)
    assert len(on_gpu.shapes(loss)) == 30
    assert set(dataclasses.replace(on_gpu, sizes=["13b"]).shapes(loss)) == {
        f"13b-{share}%{head}" for share in (1, 5, 20, 50, 100) for head in ("", "-head")
    }
    assert set(dataclasses.replace(on_gpu, sizes=["7b-5%"]).shapes(loss)) == {"7b-5%"}


def test_installed_without_the_source_tree_says_where_the_benches_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fastllava.cli.__file__", str(tmp_path / "site-packages" / "fastllava" / "cli.py"))
    done = CliRunner().invoke(app, ["bench", "kernels"])
    assert str(done.exception) == (
        "fastllava bench: the benches come with the source tree, not with the installed package; install from a checkout"
    )


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--help"], 0, "--implementations"),
        (["swigloo", "--device", "cpu"], 2, "error: bench kernels: 'swigloo' is no room"),
        (["rope", "--no-such-option"], 2, "No such option"),
    ],
)
def test_the_command_is_a_process_of_its_own_that_answers_for_itself(tmp_path: Path, words: list[str], code: int, said: str) -> None:
    program = [str(Path(sys.executable).with_name("fastllava")), "bench", "kernels", *words]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, check=False, env=os.environ | {"COLUMNS": "300"})
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr


def test_ctrl_c_reaches_the_command(tmp_path: Path) -> None:
    program = [str(Path(sys.executable).with_name("fastllava")), "bench", "kernels", "rope", "--device", "cpu", "--seconds", "1"]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    assert "GB/s copied" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_benches_are_not_on_the_import_path() -> None:
    """There `kernels` would be benches/kernels.py, which transformers takes for a library of Hugging Face."""
    assert not [place for place in sys.path if Path(place).resolve() in (REPO, REPO / "benches")]


@pytest.mark.skipif(not INTERPRETED, reason="Liger's kernels run on a CPU through Triton's interpreter only")
@pytest.mark.parametrize("shape", ["tiny", "tiny-head"])
def test_liger_computes_the_same_loss_on_every_row(shape: str) -> None:
    room = rooms()["masked_linear_cross_entropy"]
    args = room.workload.inputs(room.workload.shapes[shape], torch.float32, CPU, 0)
    bound = kernel_peers.peers(room)["liger_flce"].build(args)
    exact = judging.in_fp64(args)
    truth = judging.run(lambda: room.implementations[REFERENCE].function(*exact), judging.leaves(exact))
    got = judging.run(bound.function, bound.leaves)
    assert max(judging.distances([*got.outputs, *got.gradients], [*truth.outputs, *truth.gradients])) < 1e-6
