"""The house: the commands of the Makefile and .ci/run, what is packaged, and that nothing shadows another package."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from setuptools import find_namespace_packages

import fastllava

REPO = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))


def run(command: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A command without standard input; what it printed, both streams together."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        command,
        cwd=cwd,
        env={**clean, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the files that make needs, with a .venv that looks installed."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(REPO / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("bin/pip", "installed", "installed-dev"):
        (tmp_path / ".venv" / name).touch()
    return tmp_path


def test_help_lists_every_command(house: Path) -> None:
    listed = set(re.findall(r"make (\w+)", run(["make"], house).stdout))
    phony = re.search(r"^\.PHONY: (.*)$", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony is not None
    assert listed == set(phony[1].split())
    assert {"demo", "test", "check", "format", "help", "clean"} <= listed


@pytest.mark.parametrize(
    ("command", "what"), [("demo", ".venv/bin/fastllava demo --out demo"), ("test", ".venv/bin/pytest -n 2 --dist worksteal")]
)
def test_make_runs_it_without_installing_again(house: Path, command: str, what: str) -> None:
    planned = run(["make", "-n", command], house).stdout
    assert what in planned
    assert "pip install" not in planned


@pytest.mark.parametrize(("command", "what"), [("install", "-e ."), ("dev", '-e ".[dev]"')])
def test_make_installs_again_when_pyproject_changed(house: Path, command: str, what: str) -> None:
    later = (house / ".venv" / "installed").stat().st_mtime + 10
    os.utime(house / "pyproject.toml", (later, later))
    planned = run(["make", "-n", command], house).stdout
    assert f"pip install --quiet --disable-pip-version-check {what}" in planned
    assert "-m venv" not in planned


def test_make_makes_the_venv_first_on_a_bare_machine(house: Path) -> None:
    shutil.rmtree(house / ".venv")
    planned = run(["make", "-n", "demo", "PYTHON=some-python"], house).stdout
    order = ['"some-python" -m venv .venv', ".venv/bin/python -m pip install", ".venv/bin/fastllava demo"]
    assert sorted(order, key=planned.index) == order


def test_make_names_the_remedy_for_an_old_python(house: Path) -> None:
    shutil.rmtree(house / ".venv")
    old = house / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = run(["make", "install", f"PYTHON={old}"], house)
    assert done.returncode != 0
    assert f"fastllava needs Python 3.11 or newer, and '{old}' is not: make demo PYTHON=/path/to/python3.11" in done.stdout
    assert not (house / ".venv").exists()


@pytest.fixture
def ci(tmp_path: Path):
    """`ci(failing)`: .ci/run in a copy, with a make that only notes what it was asked for, and fails on one command."""
    shutil.copytree(REPO / ".ci", tmp_path / "repo" / ".ci")
    (tmp_path / "bin").mkdir()

    def run_ci(failing: str = "nothing") -> tuple[int, list[str], str]:
        make = tmp_path / "bin" / "make"
        make.write_text(f'#!/bin/sh\necho "$1" >> "{tmp_path}/asked"\necho "in $PWD"\n[ "$1" != {failing} ]\n')
        make.chmod(0o755)
        done = run(["bash", str(tmp_path / "repo" / ".ci" / "run")], tmp_path, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        return done.returncode, (tmp_path / "asked").read_text().split(), done.stdout

    return run_ci


def test_ci_checks_then_tests_from_the_root_and_says_so(ci, tmp_path: Path) -> None:
    code, asked, printed = ci()
    assert (code, asked) == (0, ["check", "test", "exhaustive"])
    assert printed.splitlines() == [line for command in asked for line in (f"+ make {command}", f"in {tmp_path}/repo")]


def test_ci_fails_when_a_check_fails_and_when_a_test_fails(ci) -> None:
    assert ci("check")[:2] == (1, ["check"])
    assert ci("test")[0] == 1
    assert ci("exhaustive")[0] == 1


def test_ci_is_executable() -> None:
    assert os.access(REPO / ".ci" / "run", os.X_OK)


def test_the_folder_kernels_is_not_importable() -> None:
    """transformers takes a top-level package called `kernels` for another project's."""
    found = importlib.util.find_spec("kernels")
    places = [] if found is None else [str(place) for place in found.submodule_search_locations or [found.origin]]
    assert not [place for place in places if place.startswith(str(REPO))]


def test_every_source_folder_is_a_package_and_is_packaged() -> None:
    """A folder without __init__.py would pass unseen by the import floors."""
    for where, top in ((".", "fastllava"), ("kernels", "fastllava_kernels")):
        root = REPO / where
        folders = {path.parent for path in (root / top).rglob("*.py")}
        assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []
        packaged = find_namespace_packages(str(root), include=PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"])
        assert {".".join(folder.relative_to(root).parts) for folder in folders} <= set(packaged)


@pytest.mark.parametrize("top", ["fastllava", "kernels"])
def test_no_package_imports_the_benches(top: str) -> None:
    """They come with a checkout only; what a command of the package needs lies in the package."""
    for path in sorted((REPO / top).rglob("*.py")):
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        names = [name for node in tree if isinstance(node, ast.Import | ast.ImportFrom) for name in _imported(node)]
        assert not [name for name in names if name.partition(".")[0] == "benches"], path


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]


def test_import_floors_name_every_module() -> None:
    """They name no module that is gone either: a floor with a wrong name would hold nothing."""
    floors = next(contract for contract in PYPROJECT["tool"]["importlinter"]["contracts"] if contract["type"] == "layers")["layers"]
    named = {name.strip(" ()") for floor in floors for name in re.split("[:|]", floor)}
    there = {
        path.stem if path.is_file() else path.name
        for path in (REPO / "fastllava").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert named == there - {"__init__", "__pycache__"}


def test_version_is_one() -> None:
    assert PYPROJECT["project"]["version"] == fastllava.__version__
    assert f"## [{fastllava.__version__}]" in (REPO / "CHANGELOG.md").read_text(encoding="utf-8")


def test_licence_is_apache_2() -> None:
    text = (REPO / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PYPROJECT["project"]["license"] == "Apache-2.0"


def test_console_script_exists() -> None:
    module, _, name = PYPROJECT["project"]["scripts"]["fastllava"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("top", ["fastllava", "kernels", "benches", "tests"])
def test_every_file_says_what_it_is_for(top: str) -> None:
    """A docstring that starts on the file's first line, or for a bench's script after its interpreter line."""
    for path in sorted((REPO / top).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)), f"{path.relative_to(REPO)} has no docstring"
        first = text.removeprefix("#!/usr/bin/env python3\n").splitlines()[0]
        assert first.startswith('"""'), f"{path.relative_to(REPO)}: the docstring comes first"
        assert len(first) > 10, f"{path.relative_to(REPO)}: the first line says what the file is for"


@pytest.mark.parametrize("top", ["fastllava", "kernels", "benches", "tests"])
def test_a_docstring_stands_alone(top: str) -> None:
    """One that begins with "Of" is a fragment that only the name above it completes; this holds for the strings below attributes too."""
    fragments = []
    for path in sorted((REPO / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Expr(value=ast.Constant(value=str() as text)) if text.lstrip().startswith("Of "):
                    fragments.append(f"{path.relative_to(REPO)}:{node.lineno}: {text.strip().splitlines()[0]}")
    assert fragments == []
