"""Ops: one function a room, no second list."""

import pytest
import torch

from fastllava.errors import UserError
from fastllava.model.ops import choose_ops
from fastllava_kernels import rooms

CPU = torch.device("cpu")


def test_every_room_is_an_op_under_its_name():
    ops = choose_ops(dict.fromkeys(rooms(), "reference"), CPU, torch.float32)
    assert ops.chosen == dict.fromkeys(rooms(), "reference")
    assert all(getattr(ops, name) is room.implementations["reference"].function for name, room in rooms().items())


def test_a_room_left_out_is_auto():
    chosen = choose_ops({}, CPU, torch.float32).chosen
    assert chosen.keys() == rooms().keys()
    assert all(rooms()[name].implementations[pick].unsupported(CPU, torch.float32) is None for name, pick in chosen.items())


def test_what_cannot_run_is_an_error_in_the_words_of_the_config():
    with pytest.raises(UserError, match=r"^kernels\.rope: no implementation 'fast'; write one of auto, .*reference"):
        choose_ops({"rope": "fast"}, CPU, torch.float32)
