"""On which device kernels are launched: Triton takes the current GPU, which on a machine of several need not be the tensors'."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastllava_kernels._tuning import tuning


def recorded(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> list[tuple[str, torch.device | None]]:
    """Grows by (kernel, device of the guard it is within, or None) at each launch of a kernel that one of the modules defines."""
    guards: list[torch.device] = []
    launched: list[tuple[str, torch.device | None]] = []

    class Guard:
        def __init__(self, tensor: Tensor) -> None:
            self.device = tensor.device

        def __enter__(self) -> None:
            guards.append(self.device)

        def __exit__(self, *_: object) -> None:
            guards.pop()

    class Launcher:
        def __init__(self, name: str, jit: Any) -> None:
            self.name, self.jit = name, jit

        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            launched.append((self.name, guards[-1] if guards else None))
            return self.jit[grid]

    for module in modules:
        monkeypatch.setattr(module, "on_device_of", Guard)
        for name, jit in list(vars(module).items()):
            if any(jit is kernel.function for kernel in tuning.kernels().values()):
                monkeypatch.setattr(module, name, Launcher(name, jit))
    return launched
