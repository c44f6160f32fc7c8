"""Bytes counted in Triton's interpreter: what masks leave out, what is read again, and rooms that move no more than the least."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fastllava_kernels import rooms
from fastllava_kernels._device.launch import INTERPRETED
from fastllava_kernels._tuning import traffic, tuning

interpreted = pytest.mark.skipif(not INTERPRETED, reason="bytes are counted in Triton's interpreter")


@triton.jit
def _copy(source_ptr, out_ptr, elements, TWICE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source_ptr + at, mask=at < elements, other=0.0)
    if TWICE:
        x += tl.load(source_ptr + at, mask=at < elements, other=0.0)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=at < elements)


@interpreted
@pytest.mark.parametrize("twice", [False, True])
def test_what_a_mask_leaves_out_is_not_moved(twice: bool) -> None:
    source, out = torch.ones(100), torch.empty(100, dtype=torch.float16)
    with traffic.counting() as counter:
        counter.running = "copy"
        _copy[(2,)](source, out, 100, TWICE=twice, BLOCK=64)
    assert counter.launched() == ["copy"]
    assert counter.of("copy") == (400 * (1 + twice), 200, 600), "loaded, stored, each byte once"
    assert out.tolist() == [1.0 + twice] * 100
    _copy[(2,)](source, out, 100, TWICE=twice, BLOCK=64)
    assert counter.of("copy")[1] == 200, "nothing is counted after the block"


@interpreted
def test_an_element_across_two_pages_counts_once() -> None:
    touched = traffic._Touched()
    page = 1 << traffic._PAGE_BITS
    for _ in range(2):
        touched.mark(np.array([page - 2, page, page + 2], np.uint64), 2)
    touched.mark(np.array([page + 4], np.uint64), 4)
    assert touched.bytes() == 3 * 2 + 4


@interpreted
@pytest.mark.parametrize("room", ["swiglu", "rope"])
def test_rooms_that_move_exactly_the_least(room: str) -> None:
    found = traffic.measure(room, "tiny", rooms()[room].workload.shapes["tiny"])
    assert [(one.run, one.kernel) for one in found] == [
        ("evaluation", f"{room}.forward"),
        ("forward", f"{room}.forward"),
        ("backward", f"{room}.backward"),
    ]
    assert all(one.moved == one.once == one.floor for one in found)


@interpreted
def test_a_kernel_that_reads_again_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of cos and sin that are read for every pass of a room twice as wide: the floor stays, the bytes do not."""
    shape = rooms()["rope"].workload.shapes["tiny"]
    function = rooms()["rope"].implementations["triton"].function

    class Twice:
        def __call__(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
            function(*args)
            return function(*args)

    class Implementation:
        function = Twice()

    monkeypatch.setattr(rooms()["rope"].implementations, "_loaded", {"triton": Implementation})
    first = traffic.measure("rope", "tiny", shape)[0]
    assert first.moved == 2 * first.floor


def test_shapes_have_the_widths_of_7b_and_few_rows() -> None:
    found = traffic.shapes("masked_linear_cross_entropy")
    assert list(found) == ["7b", "7b-head", "long rows"]
    assert (found["7b"]["width"], found["7b"]["rows"], found["7b"]["supervised"]) == (4096, 192, 12)
    assert found["7b-head"]["head_learns"] == 1
    assert traffic.shapes("rope")["7b"]["heads"] == 32


@pytest.mark.skipif(INTERPRETED, reason="the interpreter counts")
def test_nothing_is_counted_outside_of_the_interpreter() -> None:
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"), traffic.counting():
        pass


def test_every_launch_asks_for_its_kernel_by_name() -> None:
    told = []
    config = traffic.tuning.Noted({"BLOCK": 16}, lambda: told.append(1))
    name = next(iter(tuning.kernels()))
    with tuning.override(name, config):
        assert tuning.config(tuning.kernels()[name], 1, torch.device("cpu"))["BLOCK"] == 16
    assert told


def test_programs_go_with_the_rows() -> None:
    config = {"BLOCK": 4096, "PROGRAMS": 264}
    assert traffic._for_few_rows(config, {"rows": 192}, {"rows": 16384}) == {"BLOCK": 4096, "PROGRAMS": 3}
    assert traffic._for_few_rows(config, {"rows": 1}, {"rows": 16384})["PROGRAMS"] == 1
    assert traffic._for_few_rows({"BLOCK": 16}, {"patches": 1}, {"patches": 9}) == {"BLOCK": 16}
