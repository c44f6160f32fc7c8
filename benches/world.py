"""What a row of results was measured on: device, driver, versions, commit."""

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "liger-kernel", "xformers", "transformers", "cut-cross-entropy", "quack-kernels", "flash-attn-3")


@functools.cache
def world(device: torch.device) -> dict[str, Any]:
    """`device` in words, `versions` by package (those that are installed), `commit`, `dirty`, `driver`, `power_limit_watts`.

    What cannot be read is None.
    """
    driver, power = _driver(device)
    return {
        "device": device_name(device),
        "driver": driver,
        "power_limit_watts": power,
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda} | _versions(),
        "commit": _output("git", "-C", str(REPO), "rev-parse", "HEAD"),
        "dirty": bool(_output("git", "-C", str(REPO), "status", "--porcelain", "--untracked-files=no")),
    }


def device_name(device: torch.device) -> str:
    """Such as "NVIDIA H100 80GB HBM3", or for a CPU its model and the threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU {_cpu_model()}, {threads} thread{'s' if threads > 1 else ''}"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _driver(device: torch.device) -> tuple[str | None, float | None]:
    """Driver version and power limit of a GPU."""
    if device.type != "cuda":
        return None, None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    line = _output("nvidia-smi", f"--id={uuid}", "--query-gpu=driver_version,power.limit", "--format=csv,noheader,nounits")
    if line is None:
        return None, None
    driver, _, power = line.partition(", ")
    return driver, float(power) if power.replace(".", "", 1).isdigit() else None


def _output(*command: str) -> str | None:
    """What a command prints, or None when it is not there, fails or takes long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
