"""The GPU's time and the host's apart, on a GPU and a clock that are made up."""

from collections.abc import Callable

import pytest
import torch
from made_gpu import Made, in_place_of_a_gpu

from benches.lib import timing

CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Made:
    return in_place_of_a_gpu(monkeypatch)


def times_of(run: Callable[[], None]) -> timing.Times:
    return timing.interleaved({"it": timing.Call(lambda _: run())}, CUDA, 0.0)["it"]


@pytest.mark.parametrize(("host", "kernels", "device"), [(150, 1, 60), (20, 1, 250), (110, 40, 12), (900, 66, 30)])
def test_a_time_is_the_gpus_however_long_the_host_takes(gpu: Made, host: float, kernels: int, device: float) -> None:
    def run() -> None:
        for _ in range(kernels):
            gpu.launch(host, device)

    found = times_of(run)
    assert found.p50 == pytest.approx(kernels * device / 1e3)
    assert found.host_us == pytest.approx(kernels * host)
    assert not found.host_bound


def test_a_call_that_waits_for_the_gpu_is_said_to_be_bound_by_the_host(gpu: Made) -> None:
    def run() -> None:
        gpu.launch(10, 20)
        gpu.wait()
        gpu.launch(300, 20)

    assert times_of(run).host_bound


def test_a_time_that_depends_on_the_wait_is_said_to_be_no_time_of_the_gpu(gpu: Made) -> None:
    waited = []

    def keep_busy(microseconds: float) -> None:
        waited.append(microseconds)
        gpu.launch(5, microseconds)

    gpu.keep_busy = keep_busy
    assert times_of(lambda: gpu.launch(10, 50 + 0.1 * waited[-1])).host_bound
    assert len(set(waited[-2:])) == 2


def test_a_first_call_that_takes_long_does_not_lengthen_the_wait(gpu: Made) -> None:
    calls = []

    def run() -> None:
        calls.append(gpu.host)
        gpu.launch(20 if len(calls) > 1 else 2e6, 50)

    found = times_of(run)
    assert (found.p50, found.host_us) == (pytest.approx(0.05), pytest.approx(20))
    assert gpu.host < 2e6 + 20 * 1000
