"""`make kit`: the wheels that a bare GPU machine without a network lacks, and what of them is missing where `bench gpu` starts.

Imports the standard library alone, as on such a machine nothing else may be there. What is needed is read from pyproject.toml: its
dependencies, its extra `test`, and what builds it. What such a machine brings along, PyTorch with what belongs to it, is not gathered.
"""

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
FOLDER = REPO / "wheels"
BROUGHT = ("torch", "triton")
"""Packages of the machine: with its CUDA, and large. Stand-ins without content satisfy the others' demands for them."""
PYTHON = "3.12"
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "linux_x86_64")
_INSTALL = "python -m pip install --no-index --find-links {folder} -e '.[test]'"


def needed(root: Path = REPO) -> list[str]:
    """The requirements of running, testing and building the package of `root`, as its pyproject.toml writes them."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    return [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["test"], *project["build-system"]["requires"]]


def name_of(requirement: str) -> str:
    """The package of a requirement, such as "liger-kernel" of "liger-kernel>=0.8,<0.9; sys_platform == 'linux'"."""
    match = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement)
    assert match is not None, requirement  # noqa: S101 (a test reads pyproject.toml)
    return match[0]


def missing(requirements: Sequence[str]) -> list[str]:
    """Those of them that this Python has not, or has in a version that will not do."""
    return [each.partition(";")[0].strip() for each in requirements if not _is_met(each)]


def complaint(root: Path = REPO, folder: Path = FOLDER) -> str | None:
    """One line about what is missing here to run the benches and their tests, with the command that brings it; None where nothing is."""
    lacking = missing(needed(root))
    lacking += [] if _version("fastllava") else ["fastllava itself"]
    if not lacking:
        return None
    install = _INSTALL.format(folder=shlex.quote(str(folder)))
    if any(folder.glob("*.whl")):
        return f"this Python ({sys.executable}) lacks {', '.join(lacking)}; run: {install}"
    before = (
        f"pip install -e '.[test]', or, without a network, make kit on a machine that has one, copy {folder.name}/ to {folder}, and run: "
    )
    return f"this Python ({sys.executable}) lacks {', '.join(lacking)}; run {before}{install}"


def gather(folder: Path, requirements: Sequence[str], python: str = PYTHON) -> list[Path]:
    """Download the wheels of `requirements` and of what they need in turn, for Linux on x86-64 and that Python; the files.

    Those of packages in BROUGHT are left out. Raises subprocess.CalledProcessError when pip does not find all of them.
    """
    abi = "cp" + python.replace(".", "")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        stand_ins = [_stand_in(Path(place), name, requirements) for name in BROUGHT]
        pins = Path(place, "constraints.txt")
        pins.write_text("".join(f"{name}=={version}\n" for name, version in stand_ins), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder)]
        command += [
            "--only-binary",
            ":all:",
            "--implementation",
            "cp",
            "--python-version",
            python,
            "--find-links",
            place,
            "--constraint",
            str(pins),
        ]
        command += [word for tag in (abi, "abi3", "none") for word in ("--abi", tag)]
        command += [word for tag in _PLATFORMS for word in ("--platform", tag)]
        subprocess.run([*command, *requirements], check=True)
        for path in Path(place).glob("*.whl"):
            (folder / path.name).unlink(missing_ok=True)
    return sorted(folder.glob("*.whl"))


def _stand_in(place: Path, name: str, requirements: Sequence[str]) -> tuple[str, str]:
    """Make a wheel of `name` that has a version and nothing else, the lowest that the project takes; (name, version)."""
    (own,) = (each for each in requirements if name_of(each) == name)
    lowest = re.search(r">=\s*([\d.]+)", own)
    assert lowest is not None, own  # noqa: S101 (a test reads pyproject.toml)
    version = f"{lowest[1]}+machine"
    folder = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(place / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{folder}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nGenerator: kit\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{folder}/RECORD", "")
    return name, version


def _is_met(requirement: str) -> bool:
    found = _version(name_of(requirement))
    try:
        from packaging.requirements import Requirement
    except ImportError:
        # Which versions will do cannot be told then; that one is there can.
        return found is not None or ("sys_platform" in requirement and not sys.platform.startswith("linux"))
    wanted = Requirement(requirement)
    if wanted.marker is not None and not wanted.marker.evaluate():
        return True
    return found is not None and wanted.specifier.contains(found, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _words(paths: Sequence[Path]) -> Iterator[str]:
    yield f"{len(paths)} wheels, {sum(path.stat().st_size for path in paths) / 2**20:.0f} MiB, in {paths[0].parent}"
    yield f"copy that folder and this checkout to the machine, which brings {' and '.join(BROUGHT)}, and run there, in the checkout:"
    yield "  " + _INSTALL.format(folder="wheels")


def main() -> None:
    """Gather the kit."""
    parser = argparse.ArgumentParser(description="Gather the wheels that a bare GPU machine without a network lacks.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the wheels")
    parser.add_argument("--python", default=PYTHON, help="the machine's Python")
    given = parser.parse_args()
    try:
        paths = gather(given.out, needed(), given.python)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"error: pip ended with {error.returncode} and said above what it could not find") from None
    print(*_words(paths), sep="\n")


if __name__ == "__main__":
    main()
