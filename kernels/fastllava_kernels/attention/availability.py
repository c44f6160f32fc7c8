"""Where each implementation of attention runs, and whether it can add in one order, in words for the user."""

from functools import cache
from importlib import import_module
from inspect import signature

import torch

from fastllava_kernels._device.launch import needs_gpu
from fastllava_kernels.room import Sizes

WIDEST = 256
"""Widest head that FlashAttention takes; widths are multiples of 8."""
WIDEST_OF_4 = 128
"""The same of version 4 on a GPU of compute capability 9.x (flash_attn/cute/interface.py)."""
_FLASH_3, _FLASH_4 = "flash_attn_interface", "flash_attn.cute.interface"
"""The modules from which PyTorch takes versions 3 and 4 (torch/nn/attention/_fa3.py, _fa4.py)."""
_BUILD_3 = "build it in the folder hopper of github.com/Dao-AILab/flash-attention, where python setup.py install makes flash_attn_3"
"""PyPI has no version 3; the name of the package is setup.py's there."""


def needs_width_of_flash(sizes: Sizes) -> str | None:
    """Why FlashAttention cannot run the model, or None: its kernels take heads up to a width, in every part."""
    return _needs_width(sizes, WIDEST)


def needs_width_of_flash_4(sizes: Sizes) -> str | None:
    """Why FlashAttention 4 cannot run the model, or None."""
    return _needs_width(sizes, WIDEST_OF_4)


def needs_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why FlashAttention 2 cannot run here, or None: it needs a GPU from A100 on, and bf16 or fp16."""
    if device.type != "cuda":
        return "FlashAttention needs a CUDA GPU"
    reason = needs_gpu(device, dtype)
    if reason is None and dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention computes in bf16 or fp16, not {str(dtype).removeprefix('torch.')}"
    return reason


def needs_flash_3(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why FlashAttention 3 cannot run here, or None: it needs an H100 or H200 and its package, with backward."""
    reason = needs_flash(device, dtype) or _needs("3", {9}, _FLASH_3, _BUILD_3, device)
    if reason is None and not _flash_3_has_backward():
        return f"the installed FlashAttention 3 was built without backward: {_BUILD_3}"
    return reason


def needs_flash_4(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why FlashAttention 4 cannot run here, or None: it needs a GPU from H100 on and its package."""
    return needs_flash(device, dtype) or _needs("4", {9, 10}, _FLASH_4, "pip install flash-attn-4", device)


def needs_xformers(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why xformers cannot run here, or None: it must be built for this PyTorch."""
    reason = needs_flash(device, dtype)
    if reason is not None:
        return reason
    if (trouble := _trouble("xformers.ops.fmha")) is not None:
        return f"xformers {trouble}: pip install xformers"
    return (
        None if _xformers_has_flash() else "the installed xformers has no FlashAttention for this PyTorch: install the release made for it"
    )


def unordered_flash_4(device: torch.device) -> str | None:
    """Why FlashAttention 4 gives other bits the next time, or None: its backward for compute capability 9.x learned an order late."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9 or _flash_4_orders_on_9():
        return None
    return "the installed FlashAttention 4 has no backward with one order of additions for compute capability 9.x"


def unordered_xformers(device: torch.device) -> str | None:
    """Why xformers gives other bits the next time, or None: it asks for one order only where it runs PyTorch's own FlashAttention 2."""
    if device.type != "cuda" or _xformers_runs_pytorchs():
        return None
    return "xformers never asks FlashAttention's packages for one order of additions"


def _needs_width(sizes: Sizes, widest: int) -> str | None:
    for part, width in sizes.head_widths.items():
        if width % 8 or width > widest:
            return f"it takes heads whose width is a multiple of 8 up to {widest}, and those of {part} are {width} wide"
    return None


def _needs(version: str, generations: set[int], module: str, remedy: str, device: torch.device) -> str | None:
    major = torch.cuda.get_device_capability(device)[0]
    if major not in generations:
        wanted = " or ".join(f"{generation}.x" for generation in sorted(generations))
        return f"FlashAttention {version} needs compute capability {wanted}, this GPU has {major}.x"
    return None if (trouble := _trouble(module)) is None else f"FlashAttention {version} {trouble}: {remedy}"


@cache
def _trouble(module: str) -> str | None:
    """What is wrong with a library's module, or None. It is loaded: one made for another PyTorch would fail in the first step."""
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            return "is not installed"
        return f"cannot be loaded ({error})"
    except Exception as error:
        return f"cannot be loaded ({' '.join(str(error).split())[:160]})"
    return None


def _flash_3_has_backward() -> bool:
    return hasattr(torch.ops.flash_attn_3, "bwd")


@cache
def _flash_4_orders_on_9() -> bool:
    try:
        backward = import_module("flash_attn.cute.flash_bwd_sm90").FlashAttentionBackwardSm90
    except (ImportError, AttributeError):
        return False
    return "deterministic" in signature(backward.__init__).parameters


@cache
def _xformers_has_flash() -> bool:
    from xformers.ops import fmha

    return fmha.flash3.FwOp.is_available() or fmha.flash.FwOp.is_available()


@cache
def _xformers_runs_pytorchs() -> bool:
    from xformers.ops import fmha

    return not fmha.flash3.FwOp.is_available() and bool(getattr(fmha.flash, "_USE_PT_FLASH_ATTN", False))
