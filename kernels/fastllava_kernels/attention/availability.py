"""Where each implementation of attention runs, in words for the user."""

from functools import cache
from importlib.util import find_spec

import torch

from fastllava_kernels._device.launch import needs_gpu
from fastllava_kernels.room import Sizes

WIDEST = 256
"""Widest head that FlashAttention takes; widths are multiples of 8."""


def needs_width_of_flash(sizes: Sizes) -> str | None:
    """Why FlashAttention cannot run the model, or None: its kernels take heads up to a width, in every part."""
    for part, width in sizes.head_widths.items():
        if width % 8 or width > WIDEST:
            return f"it takes heads whose width is a multiple of 8 up to {WIDEST}, and those of {part} are {width} wide"
    return None


def needs_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why FlashAttention 2 cannot run here, or None: it needs a GPU from A100 on, and bf16 or fp16."""
    if device.type != "cuda":
        return "FlashAttention needs a CUDA GPU"
    reason = needs_gpu(device, dtype)
    if reason is None and dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention computes in bf16 or fp16, not {str(dtype).removeprefix('torch.')}"
    return reason


def needs_flash_3(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why FlashAttention 3 cannot run here, or None: it needs an H100 or H200 and its package."""
    return needs_flash(device, dtype) or _needs("3", {9}, "flash_attn_interface", device)


def needs_flash_4(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why FlashAttention 4 cannot run here, or None: it needs a GPU from H100 on and its package."""
    return needs_flash(device, dtype) or _needs("4", {9, 10}, "flash_attn.cute", device)


def needs_xformers(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why xformers cannot run here, or None: it must be built for this PyTorch."""
    reason = needs_flash(device, dtype)
    if reason is not None:
        return reason
    if not _installed("xformers"):
        return "xformers is not installed: pip install xformers"
    return (
        None if _xformers_has_flash() else "the installed xformers has no FlashAttention for this PyTorch: install the release made for it"
    )


def _needs(version: str, generations: set[int], package: str, device: torch.device) -> str | None:
    major = torch.cuda.get_device_capability(device)[0]
    if major not in generations:
        wanted = " or ".join(f"{generation}.x" for generation in sorted(generations))
        return f"FlashAttention {version} needs compute capability {wanted}, this GPU has {major}.x"
    return None if _installed(package) else f"FlashAttention {version} is not installed: pip install flash-attn-{version}"


@cache
def _installed(package: str) -> bool:
    parent = package.partition(".")[0]
    return find_spec(parent) is not None and find_spec(package) is not None


@cache
def _xformers_has_flash() -> bool:
    from xformers.ops import fmha

    return fmha.flash3.FwOp.is_available() or fmha.flash.FwOp.is_available()
