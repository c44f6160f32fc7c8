"""Ops: one function a room, no second list."""

from dataclasses import replace

import pytest
import torch

from fastllava.errors import UserError
from fastllava.model import ops
from fastllava.model.ops import choose_ops
from fastllava_kernels import rooms
from fastllava_kernels.room import Sizes, runs_anywhere

CPU = torch.device("cpu")


def test_every_room_is_an_op_under_its_name():
    found = choose_ops(dict.fromkeys(rooms(), "reference"), CPU, torch.float32)
    assert found.chosen == dict.fromkeys(rooms(), "reference")
    assert all(getattr(found, name) is room.implementations["reference"].function for name, room in rooms().items())


def test_a_room_left_out_is_auto():
    chosen = choose_ops({}, CPU, torch.float32).chosen
    assert chosen.keys() == rooms().keys()
    assert all(rooms()[name].implementations[pick].unsupported(CPU, torch.float32) is None for name, pick in chosen.items())


def test_what_cannot_run_is_an_error_in_the_words_of_the_config():
    with pytest.raises(UserError, match=r"^kernels\.rope: no implementation 'fast'; write one of auto, .*reference"):
        choose_ops({"rope": "fast"}, CPU, torch.float32)


@pytest.mark.parametrize(("width", "chosen"), [(128, "varlen"), (100, "reference")])
def test_auto_passes_on_what_flash_attention_does_not_take(monkeypatch: pytest.MonkeyPatch, width: int, chosen: str) -> None:
    """The choice is that of a GPU where FlashAttention runs."""
    room = rooms()["attention"]
    anywhere = {name: replace(one, unsupported=runs_anywhere) if name == "varlen" else one for name, one in room.implementations.items()}
    monkeypatch.setattr(ops, "rooms", lambda: {"attention": replace(room, implementations=anywhere)})
    sizes = Sizes({"model.llm": width, "model.vision_tower": 64})
    assert ops.choose_ops({}, CPU, torch.bfloat16, sizes=sizes).chosen == {"attention": chosen}
    if chosen != "varlen":
        with pytest.raises(UserError, match=r"'varlen' cannot run here .*those of model\.llm are 100 wide.*write kernels\.attention=auto"):
            ops.choose_ops({"attention": "varlen"}, CPU, torch.bfloat16, sizes=sizes)
