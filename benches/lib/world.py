"""What a row of results was measured on: device, driver, versions, commit, and the code itself."""

import functools
import hashlib
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastllava.errors import UserError
from fastllava.train.metrics.summary import commit, versions_of

REPO = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch",
    "triton",
    "liger-kernel",
    "xformers",
    "transformers",
    "cut-cross-entropy",
    "quack-kernels",
    "flash-attn-3",
    "flash-attn-4",
)
SOURCES = ("fastllava/**/*.py", "kernels/**/*.py", "kernels/**/tables/*.json", "benches/**/*.py")


@functools.cache
def world(device: torch.device) -> dict[str, Any]:
    """`device` in words, `versions` by package (those that are installed), `commit`, `dirty`, `driver`, `power_limit_watts`.

    What cannot be read is None.
    """
    gpu = nvidia_smi(device, "driver_version", "power.limit") or {}
    watts = gpu.get("power.limit", "").removesuffix(" W")
    sha, dirty = commit() or (None, False)
    return {
        "device": device_name(device),
        "driver": gpu.get("driver_version"),
        "power_limit_watts": float(watts) if watts.replace(".", "", 1).isdigit() else None,
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda} | versions_of(PACKAGES),
        "commit": sha,
        "dirty": dirty,
    }


def device_name(device: torch.device) -> str:
    """Such as "NVIDIA H100 80GB HBM3", or for a CPU its model and the threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU {_cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"


def check_device(device: torch.device) -> None:
    """Raises UserError for a GPU that is not there."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: PyTorch finds no CUDA GPU here; write --device cpu")


def nvidia_smi(device: torch.device, *fields: str) -> dict[str, str] | None:
    """What nvidia-smi says of these fields of a GPU; None of a CPU, and where it cannot be asked."""
    if device.type != "cuda":
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, done.stdout.strip().split(", "), strict=False))


def code_of(patterns: Sequence[str], root: Path = REPO) -> str:
    """Twelve hexadecimal digits that change with any of the files; the same with and without a commit."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in root.glob(pattern)}):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
