"""The tests of exports on the oldest and on the newest transformers that pyproject.toml allows, each fetched beside the one installed."""

import json
import os
import re
import subprocess
import sys
import tomllib

import pytest

pytestmark = pytest.mark.exhaustive

TESTS = (
    "tests/export",
    "tests/model/test_write_hf.py",
    "tests/model/test_oracle.py",
    "tests/training/test_families.py",
    "tests/training/test_towers.py",
    "tests/model/test_towers.py",
    "tests/data/test_tower_pixels.py",
)
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
MOVES = {"transformers", "tokenizers", "huggingface-hub", "fastllava"}
"""What may have another version; all else stays as it is here, so that a difference is transformers' own."""


def installed():
    """Each package of this environment by its name in lower case with hyphens, and its version without a local part.

    A new process says it: in this one sys.path may have grown, by the packages within setuptools for one, and those have other versions.
    """
    listed = subprocess.run([*PIP, "list", "--format", "json"], capture_output=True, text=True, check=True, timeout=120)
    return {one["name"].lower().replace("_", "-"): one["version"].partition("+")[0] for one in json.loads(listed.stdout)}


def allowed(repo, which):
    """The requirement that pip gets: the first release line of the range, or the whole range, of which it takes the newest."""
    dependencies = tomllib.loads((repo / "pyproject.toml").read_text())["project"]["dependencies"]
    found = next(line for line in dependencies if line.startswith("transformers"))
    if which == "newest":
        return found
    first = re.search(r">=([\d.]+)", found)
    assert first
    return f"transformers=={first[1]}.*"


@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_exports_are_right_there_too(repo, tmp_path, which):
    wanted, place, pins = allowed(repo, which), tmp_path / "beside", tmp_path / "pins.txt"
    pins.write_text("".join(f"{name}=={version}\n" for name, version in installed().items() if name not in MOVES))
    fetched = subprocess.run(
        [*PIP, "install", "--quiet", "--target", str(place), wanted, "-c", str(pins)], capture_output=True, text=True, timeout=600
    )
    if "No matching distribution found" in fetched.stderr:
        pytest.skip(f"no package index gives {wanted}: {fetched.stderr.strip().splitlines()[-1]}")
    assert fetched.returncode == 0, fetched.stderr
    environment = {**os.environ, "PYTHONPATH": str(place)}
    version = [sys.executable, "-c", "import transformers; print(transformers.__version__, transformers.__file__)"]
    found = subprocess.run(version, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout
    assert str(place) in found
    options = ["-m", "not exhaustive", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *TESTS, *options], cwd=repo, env=environment, capture_output=True, text=True, timeout=900
    )
    assert ran.returncode == 0, f"on transformers {found}: {ran.stdout[-3000:]}"
