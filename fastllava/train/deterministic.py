"""One order of additions, so that a run which is killed and resumed is bit for bit the unbroken one (`train.deterministic`).

Ops on a CPU add in one order anyway. On a GPU one op of a step adds in any order unless it is asked not to: the backward of
FlashAttention, whose versions all take the order that `torch.use_deterministic_algorithms` asks for. That switch also makes PyTorch
refuse what has no such order, holds cuBLAS to one workspace, and keeps Inductor from choosing kernels by their times.
"""

import os

import torch

from fastllava.config import Config
from fastllava.errors import UserError
from fastllava.model.ops import Ops
from fastllava_kernels.attention.repeats import repeats

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_ORDERED_WORKSPACES = (":4096:8", ":16:8")
"""With these cuBLAS gives the same bits on several streams (NVIDIA's cuBLAS documentation, "Results Reproducibility")."""


def is_asked_for(config: Config) -> bool:
    """Whether every op must add in one order. `auto` asks for nothing: it is bit for bit where that is free, on a CPU."""
    return config.train.deterministic is True


def set_deterministic(config: Config) -> None:
    """Let ops add in any order, or not: in either case by the config, whatever PyTorch or another run left behind.

    Raises UserError when the environment has a workspace for cuBLAS that PyTorch refuses then.
    """
    wanted = is_asked_for(config)
    if wanted:
        allow_deterministic()
        found = os.environ[WORKSPACE]
        if found not in _ORDERED_WORKSPACES:
            allowed = " or ".join(_ORDERED_WORKSPACES)
            raise UserError(
                f"train.deterministic: true needs {WORKSPACE} to be {allowed}, and the environment has '{found}'; unset it there"
            )
    torch.use_deterministic_algorithms(wanted)
    # What is not written to is not read either: to fill it would only take time.
    torch.utils.deterministic.fill_uninitialized_memory = not wanted  # pyright: ignore[reportAttributeAccessIssue]


def allow_deterministic() -> None:
    """Make it possible for this process: PyTorch looks at cuBLAS's workspace at the first product, and never again."""
    os.environ.setdefault(WORKSPACE, _ORDERED_WORKSPACES[0])


def check_repeats(config: Config, device: torch.device, ops: Ops, width: int) -> None:
    """Try it on a GPU where it is asked for: gradients of one input, twice, of heads this wide.

    Raises UserError when attention does not repeat them. A build of FlashAttention 3 from before September 2025 takes the argument
    and adds in any order nevertheless (flash-attention 1596, 1893).
    """
    if not is_asked_for(config) or device.type != "cuda":
        return
    chosen = ops.chosen["attention"]
    if not repeats(ops.attention, device, torch.bfloat16 if config.train.precision == "bf16" else torch.float32, width):
        raise UserError(
            f"train.deterministic: kernels.attention={chosen} was asked for one order of additions, and gives other bits each time; "
            "install a newer build of it, or write kernels.attention=varlen, or train.deterministic=false"
        )


def deterministic_in_words(config: Config, device: torch.device, world: int) -> str:
    """What the key means here: whether a run that is killed and resumed is bit for bit the unbroken one."""
    said = str(config.train.deterministic).lower()
    others = f", on {world} processes again" if world > 1 else ""
    if device.type != "cuda" or is_asked_for(config):
        return f"deterministic: {said}; additions have one order, so a resumed run is bit for bit the unbroken one{others}"
    return (
        f"deterministic: {said}; attention's backward adds in any order, which is faster, so a resumed run equals the unbroken one "
        "up to rounding; train.deterministic=true makes it bit for bit"
    )
