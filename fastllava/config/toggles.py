"""Every toggle, for `fastllava toggles`: read from the config's fields and from the rooms, so that there is no second list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from fastllava.config.keys import LEVER, marked, same_training
from fastllava_kernels import choose, rooms
from fastllava_kernels.room import SEPARATE, Room, why_not

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Toggle:
    """A config key whose values give the same training, apart from the order of additions."""

    key: str
    values: tuple[str, ...]
    default: str
    """What runs on this machine when the config does not say."""
    why: tuple[str, ...]
    """What it is, and what cannot run here for what reason."""
    needs: tuple[str, ...] = ()
    """key=value words of a run of LLaVA-1.5 in which it changes what runs; none where any run will do."""


def train_toggles() -> Iterator[Toggle]:
    """Those that are not kernels."""
    yield from _toggles(same_training())


def levers() -> Iterator[Toggle]:
    """Keys that trade accuracy for memory or time. Their values are another training, so they are no toggles."""
    yield from _toggles(marked(LEVER))


def _toggles(fields: Iterator[tuple[str, FieldInfo]]) -> Iterator[Toggle]:
    for key, field in fields:
        if values := _values(field.annotation):
            yield Toggle(key, values, _word(field.default), (field.description or "",))


_NEEDS: Mapping[str, tuple[str, ...]] = {
    "lora_linear": ("lora.rank=128",),
    # Linear layers without an adapter, beside some with one.
    "nf4_linear": ("model.quantize=nf4", "lora.rank=128", "lora.targets=[q_proj]"),
}
"""The words that a run needs for the toggles of these rooms to matter."""


def kernel_toggles(device: torch.device | None = None, dtype: torch.dtype | None = None) -> Iterator[Toggle]:
    """One for each room, on `device`, or on the GPU where there is one, in `dtype`, or bf16."""
    # What runs here is a question for torch; the names of the toggles are not.
    import torch

    dtype = dtype or torch.bfloat16
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, room in rooms().items():
        chosen, compiled = (choose(room, "auto", device, dtype, compiled=within) for within in (False, True))
        default = chosen if chosen == compiled else f"{chosen}; {compiled} under train.compile"
        parts = (f"kernels.{whole.name}={SEPARATE}" for whole in rooms().values() if name in whole.parts)
        needs = (*parts, *_NEEDS.get(name, ()))
        why = [room.summary, *(f"runs in a LLaVA-1.5 with {word}" for word in needs)]
        if room.parts:
            why.append(f"{SEPARATE}: {' and '.join(f'kernels.{part}' for part in room.parts)} run in its place, one after the other")
        yield Toggle(f"kernels.{name}", room.values, default, (*why, *_reasons(room, device, dtype)), needs)


def _reasons(room: Room, device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    """A line for each reason why some implementations do not run here, or not by themselves."""
    names: dict[str, list[str]] = {}
    for name, implementation in room.implementations.items():
        if (reason := why_not(room, name, device, dtype)) is not None:
            names.setdefault(f"cannot run here: {reason}", []).append(name)
        elif device.type not in implementation.auto_on:
            names.setdefault("only when asked for by name", []).append(name)
        elif (reason := why_not(room, name, device, dtype, compiled=True)) is not None:
            names.setdefault(f"not under train.compile: {reason}", []).append(name)
    yield from (f"{', '.join(who)} {why}" for why, who in names.items())


def _values(annotation: Any) -> tuple[str, ...]:
    """The values that a config key may have; none where they cannot be counted."""
    values = (False, True) if annotation is bool else get_args(annotation) if get_origin(annotation) is Literal else ()
    return tuple(map(_word, values))


def _word(value: Any) -> str:
    return str(value).lower()
