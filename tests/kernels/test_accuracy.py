"""Every implementation of every room against the truth: the op written out once more, row by row, in fp64 (truths/).

Three-way: the reference may be no farther from truth than its dtype allows (`REACH`), any other implementation no farther
than the reference in the same dtype plus the room's slack. `test_reach_is_tight_enough_to_fail` shows that the reach tells
each op from its nearest wrong one. On a GPU everything runs there in bf16 too; without one, Triton kernels are interpreted.
"""

from typing import Any

import pytest
import torch
from judging import FP64, distances, outputs_and_gradients, rounded
from truths import truth_of

from fastllava_kernels import Implementation, Room, rooms
from fastllava_kernels._device.launch import INTERPRETED
from fastllava_kernels.room import REFERENCE

# Inputs are rounded to the dtype before truth sees them, so this is what the computation itself may lose.
REACH = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def runs_here(implementation: Implementation, dtype: torch.dtype) -> bool:
    """On this machine's device, or through the interpreter, whose bf16 is wrong."""
    if DEVICE.type not in implementation.auto_on:
        # Each graph of torch.compile costs seconds of a C++ compiler: test_library_rooms.py has one.
        return False
    if implementation.unsupported(DEVICE, dtype) is None:
        return True
    return implementation.interpretable and INTERPRETED and dtype is not torch.bfloat16


def every_case() -> list[Any]:
    return [
        pytest.param(room, name, case, dtype, id=f"{room.name}-{name}-{case}-{str(dtype).removeprefix('torch.')}")
        for room in rooms().values()
        for name, implementation in room.implementations.items()
        for case in truth_of(room.name).CASES
        for dtype in REACH
        if runs_here(implementation, dtype)
    ]


def errors(room: Room, name: str, case: str, dtype: torch.dtype) -> tuple[list[float], list[torch.Tensor]]:
    """Distance to truth of each output and gradient, and they themselves."""
    module = truth_of(room.name)
    args = module.CASES[case]
    truth = outputs_and_gradients(module.truth, rounded(args, dtype, FP64))
    got = outputs_and_gradients(room.implementations[name].function, rounded(args, dtype, dtype, DEVICE))
    return distances(got, truth), got


@pytest.mark.parametrize(("room", "name", "case", "dtype"), every_case())
def test_close_to_truth(room: Room, name: str, case: str, dtype: torch.dtype) -> None:
    found, got = errors(room, name, case, dtype)
    assert got[0].dtype == (torch.float32 if room.name == "masked_linear_cross_entropy" else dtype)
    allowed = [REACH[dtype]] * len(found)
    if name != REFERENCE:
        allowed = [error + room.slack[dtype] for error in errors(room, REFERENCE, case, dtype)[0]]
    assert all(error <= most for error, most in zip(found, allowed, strict=True)), f"distances {found}, allowed {allowed}"


@pytest.mark.parametrize("room", rooms().values(), ids=rooms())
def test_every_room_has_a_truth_with_cases(room: Room) -> None:
    module = truth_of(room.name)
    assert len(module.CASES) >= 2
    assert module.WRONG_CASE in module.CASES


@pytest.mark.parametrize("room", rooms())
def test_reach_is_tight_enough_to_fail(room: str) -> None:
    module = truth_of(room)
    args = module.CASES[module.WRONG_CASE]
    truth = outputs_and_gradients(module.truth, rounded(args, torch.float32, FP64))[0]
    got = outputs_and_gradients(module.wrong, rounded(args, torch.float32, torch.float32))[0]
    assert distances([got], [truth])[0] > 10 * REACH[torch.float32]


@pytest.mark.parametrize("room", rooms())
def test_reference_in_fp64_is_the_truth(room: str) -> None:
    """So the reference in fp64 may judge at shapes for which writing out every row takes too long."""
    module = truth_of(room)
    reference = rooms()[room].implementations[REFERENCE].function
    for args in module.CASES.values():
        truth = outputs_and_gradients(module.truth, rounded(args, FP64, FP64))
        assert max(distances(outputs_and_gradients(reference, rounded(args, FP64, FP64)), truth)) < 1e-13
