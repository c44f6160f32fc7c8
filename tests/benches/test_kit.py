"""`make kit` and what `bench gpu` says where something is missing; pip gets its wheels from a folder, not from a network."""

import signal
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from benches import kit
from fastllava import entry

REPO = Path(__file__).resolve().parents[2]


def wheel(folder: Path, name: str, *requires: str) -> None:
    """Make a wheel of version 1.0 with nothing but what it needs."""
    about = f"{name}-1.0.dist-info"
    needs = "".join(f"Requires-Dist: {each}\n" for each in requires)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")


def test_what_is_needed_is_what_the_project_says() -> None:
    names = {kit.name_of(each) for each in kit.needed()}
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert {"pydantic", "hypothesis", "liger-kernel", "sentencepiece", "pytest", "setuptools"} <= names
    assert names >= {kit.name_of(each) for each in project["dependencies"]} >= set(kit.BROUGHT)
    assert "ruff" not in names


def test_the_kit_holds_what_is_needed_in_turn_and_not_what_the_machine_brings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, out = tmp_path / "index", tmp_path / "wheels"
    index.mkdir()
    wheel(index, "one", "two", "torch>=2.5")
    wheel(index, "two", "triton")
    wheel(index, "three")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    own = ["torch>=2.11,<2.14", "triton>=3.6,<3.10; sys_platform == 'linux'"]
    assert [path.name for path in kit.gather(out, ["one", *own])] == ["one-1.0-py3-none-any.whl", "two-1.0-py3-none-any.whl"]
    with pytest.raises(subprocess.CalledProcessError):
        kit.gather(out, ["no-such-package-here", *own])


def test_what_is_missing() -> None:
    numpy = metadata.version("numpy")
    wanted = [f"numpy=={numpy}", "numpy<0.1", "no-such-package-here>=1,<2; sys_platform == 'linux'", "not-there; sys_platform == 'win32'"]
    assert kit.missing(wanted) == ["numpy<0.1", "no-such-package-here>=1,<2"]
    assert kit.missing(kit.needed()) == []


def test_the_complaint_is_one_line_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kit.complaint(folder=tmp_path) is None
    there = kit._version
    monkeypatch.setattr(kit, "_version", lambda name: None if name in ("pydantic", "fastllava") else there(name))
    said = kit.complaint(folder=tmp_path)
    assert said is not None
    assert "lacks pydantic>=2.9,<3, fastllava itself; run pip install -e '.[test]', or, without a network, make kit" in said
    assert "\n" not in said
    wheel(tmp_path, "one")
    said = kit.complaint(folder=tmp_path)
    assert said is not None
    assert said.endswith(
        f"lacks pydantic>=2.9,<3, fastllava itself; run: python -m pip install --no-index --find-links {tmp_path} -e '.[test]'"
    )


def test_bench_gpu_on_a_bare_machine() -> None:
    """-S: this Python without a single package."""
    command = [sys.executable, "-S", "-P", str(REPO / "benches/__main__.py"), "gpu", "--out", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: bench gpu: this Python ({sys.executable}) lacks torch>=2.11,<2.14, ")
    assert "hypothesis>=6.100" in line
    assert "make kit" in line or "--find-links" in line


def test_the_program_on_a_bare_machine_names_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "fastllava.cli"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("fastllava.cli", raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit, match=r"error: this Python \(.*\) lacks the package typer; install what it needs: "):
        entry.main()
    assert signal.getsignal(signal.SIGINT) is before
