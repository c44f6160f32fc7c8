"""`fastllava bench tuning` on a GPU that is made up: what is timed, what is no candidate, and what is chosen."""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made_gpu import Made, in_place_of_a_gpu

from benches import tuning as module
from fastllava_kernels import rooms
from fastllava_kernels._device.launch import INTERPRETED
from fastllava_kernels._tuning import tune, tuning
from fastllava_kernels.workload import Cost, Workload

CUDA = torch.device("cuda")
CANDIDATES = [{"BLOCK": block, "num_warps": 4, "num_stages": 1} for block in (1, 2, 3)]


class Function:
    """A kernel that takes the made-up GPU as long as is said for its block, and remembers where it was launched."""

    def __init__(self, gpu: Made, microseconds: Mapping[int, float]) -> None:
        self.gpu, self.microseconds, self.launched = gpu, microseconds, []

    def run(self, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        self.launched.append((constants["BLOCK"], grid, args))
        self.gpu.launch(20, self.microseconds[constants["BLOCK"]])

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **constants: self.run(*args, grid=grid, warmup=False, **constants)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Made:
    return in_place_of_a_gpu(monkeypatch)


def kernel(name: str, function: Function) -> tuning.Kernel:
    return tuning.Kernel(name, function, {}, {}, {"sm_90": CANDIDATES}, "rows")


def room(monkeypatch: pytest.MonkeyPatch, function: Function, kernels: Sequence[tuning.Kernel], refused: Mapping[int, str]) -> None:
    """A room whose forward launches the last kernel first and then others, each between long work of other kernels."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        for one in reversed(kernels):
            function.gpu.launch(300, 700)
            config = tuning.config(one, len(x), CUDA)
            function[(len(x) // config["BLOCK"],)](x, **config)
        return x

    workload = Workload({"7b": {"rows": 12}}, lambda shape, *_: (torch.zeros(shape["rows"]),), lambda *_: Cost(0, 0))
    made = SimpleNamespace(implementations={"triton": SimpleNamespace(function=forward)}, workload=workload)
    monkeypatch.setattr(tune, "rooms", lambda: {"op": made})
    monkeypatch.setattr(tuning, "kernels", lambda: {one.name: one for one in kernels})
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tuning, "read_table", lambda arch: {})
    monkeypatch.setattr(tuning, "_buckets", tuning._buckets.__wrapped__)

    def compiled(kernel: Any, config: Mapping[str, int], arch: str) -> Any:
        return SimpleNamespace(problems=lambda *_: [refused[config["BLOCK"]]] if config["BLOCK"] in refused else [])

    monkeypatch.setattr(tune.aot, "compile_kernel", compiled)


def test_the_kernel_alone_is_timed_and_the_fastest_chosen(monkeypatch: pytest.MonkeyPatch, gpu: Made) -> None:
    function = Function(gpu, {1: 40.0, 2: 25.0, 3: 30.0})
    wanted, other = kernel("op.forward", function), kernel("op.other", function)
    room(monkeypatch, function, [wanted, other], {})
    row, chosen = module.measure("op.forward", None, CUDA, "7b")
    assert [(config["BLOCK"], ms) for config, ms in row["candidates"]] == [(1, pytest.approx(0.04)), (2, pytest.approx(0.025)), (3, 0.03)]
    assert (chosen, row["after"], row["void"]) == (CANDIDATES[1], CANDIDATES[1], None)
    assert (row["before_ms"], row["after_ms"]) == (pytest.approx(0.04), pytest.approx(0.025))
    # The other kernel of the same function is launched with the room, never again by itself; each takes its own configuration's grid.
    assert {(block, grid) for block, grid, _ in function.launched} == {(1, (12,)), (2, (6,)), (3, (4,))}
    assert sum(block == 2 for block, *_ in function.launched) > 2
    assert "run" not in vars(function)


def test_each_launch_finds_a_cold_cache_and_a_busy_gpu(monkeypatch: pytest.MonkeyPatch, gpu: Made) -> None:
    function = Function(gpu, {1: 40.0, 2: 25.0, 3: 30.0})
    room(monkeypatch, function, [kernel("op.forward", function)], {})
    before, keep_busy = [], gpu.keep_busy

    def counted(microseconds: float) -> None:
        keep_busy(microseconds)
        before.append(len(function.launched))

    gpu.keep_busy = counted
    row, _ = module.measure("op.forward", None, CUDA, "7b")
    assert row["void"] is None
    assert before == list(range(before[0], len(function.launched))), "the cache is overwritten before every launch that is timed"


def test_what_spills_is_no_candidate_and_is_not_launched(monkeypatch: pytest.MonkeyPatch, gpu: Made) -> None:
    function = Function(gpu, {1: 40.0, 2: 25.0, 3: 30.0})
    room(monkeypatch, function, [kernel("op.forward", function)], {2: "spills (8)"})
    row, chosen = module.measure("op.forward", None, CUDA, "7b")
    assert chosen == CANDIDATES[2]
    assert row["refused"] == [f"{CANDIDATES[1]}: spills (8)"]
    assert all(block != 2 for block, *_ in function.launched)


def test_where_nothing_passes_nothing_is_chosen(monkeypatch: pytest.MonkeyPatch, gpu: Made) -> None:
    function = Function(gpu, {})
    room(monkeypatch, function, [kernel("op.forward", function)], dict.fromkeys((1, 2, 3), "spills (8)"))
    row, chosen = module.measure("op.forward", None, CUDA, "7b")
    assert (chosen, row["void"], len(row["refused"])) == (None, "no candidate for sm_90 passes", 3)


def test_what_does_not_launch_is_no_candidate(monkeypatch: pytest.MonkeyPatch, gpu: Made) -> None:
    function = Function(gpu, {1: 40.0, 3: 30.0})
    room(monkeypatch, function, [kernel("op.forward", function)], {})
    row, chosen = module.measure("op.forward", None, CUDA, "7b")
    assert chosen == CANDIDATES[2]
    assert row["refused"] == [f"{CANDIDATES[1]}: KeyError: 2"]


def test_times_that_are_not_the_gpus_choose_nothing(monkeypatch: pytest.MonkeyPatch, gpu: Made) -> None:
    function = Function(gpu, {1: 40.0, 2: 25.0, 3: 30.0})
    room(monkeypatch, function, [kernel("op.forward", function)], {})
    launch = function.gpu.launch

    def waiting(host: float, device: float) -> None:
        launch(host, device)
        if device == 30.0:
            gpu.wait()
            launch(10, 1)

    monkeypatch.setattr(gpu, "launch", waiting)
    row, chosen = module.measure("op.forward", None, CUDA, "7b")
    assert chosen is None
    assert "the GPU waited for the host" in row["void"]


@pytest.mark.skipif(not INTERPRETED, reason="launches kernels in Triton's interpreter")
@pytest.mark.parametrize("name", ["layer_norm.forward", "layer_norm.backward", "layer_norm.backward_frozen", "splice.embed"])
def test_a_shape_launches_it(name: str) -> None:
    row, _ = module.measure(name, None, torch.device("cpu"), "tiny")
    assert (row["void"], len(row["candidates"])) == (None, 1)
    assert row["shape"] in rooms()[row["room"]].workload.shapes


@pytest.mark.skipif(not INTERPRETED, reason="launches kernels in Triton's interpreter")
def test_a_launch_can_be_repeated() -> None:
    """With the same arguments it writes the same again."""
    one = tuning.kernels()["rms_norm.forward"]
    config = one.candidates["interpreter"][0]
    _, run = tune.launching(one, config, None, torch.device("cpu"), "tiny")
    with tune.launches(one, config) as launches:
        run()
    (launch,) = launches
    out = launch.args[3]
    written = out.clone()
    out.zero_()
    launch()
    assert torch.equal(out, written)
    assert written.abs().sum() > 0
