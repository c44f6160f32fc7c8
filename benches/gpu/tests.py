"""Piece `tests` of `fastllava bench gpu`: the tests that use a GPU where there is one, a row each, all failures collected.

A test that has a row is not run again: a run that was stopped, or whose GPU a test broke, goes on with the rest.
"""

import importlib.util
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benches.gpu.context import Context, Piece, say
from benches.gpu.state import DeviceLost, Notebook
from benches.results import Row
from benches.world import REPO, world

FOLDERS = ("tests/kernels", "tests/training", "tests/model")
"""What runs on a GPU where there is one, and the models that the kernels are for; the most telling first."""
TOTALS = "totals"
FAILED = ("failed", "error")
WORKERS = 8
"""At most: a test's truth is computed on the host, and the GPU is shared."""
LONGEST = 8
"""Lines of an error that are kept."""
GPU_GONE = 75
"""pytest's exit code when a test left the GPU unusable (tests/conftest.py)."""


def test_units(size: str) -> list[str]:
    """One, a selection of paths: what is left of it is known by test."""
    return [",".join(FOLDERS)]


def run_tests(context: Context, unit: str) -> None:
    """A row for each test of "path,path" as it ends, then one of totals."""
    paths = unit.split(",")
    if context.on_gpu:
        # Inductor takes a process a core for itself, and here it runs in several.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
    rows = [row for row in context.note.state.rows() if row["test"] is not None]
    recorder = Recorder(context.note, {row["test"] for row in rows})
    with tempfile.TemporaryDirectory() as folder:
        left_out = Path(folder, "recorded.txt")
        left_out.write_text("".join(f"{name}\n" for name in sorted(recorder.recorded)), encoding="utf-8")
        code = pytest.main([*options(left_out, context.on_gpu), *(str(REPO / path) for path in paths)], plugins=[recorder])
    if code == GPU_GONE:
        raise DeviceLost("a test left the GPU unusable")
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        context.note.row({"test": None, "outcome": "broken"}, f"pytest ended with {code}; see the log")
        return
    found = [row for row in context.note.state.rows() if row["test"] is not None]
    totals = dict(Counter(row["outcome"] for row in found)) | {"seconds": round(sum(row["seconds"] for row in found), 2)}
    failed = [row["test"] for row in found if row["outcome"] in FAILED]
    context.note.row(
        {"test": None, "outcome": TOTALS, "of": paths, **totals, **world(context.device)},
        f"{len(failed)} tests failed, first {failed[0]}" if failed else None,
    )
    say(tests_in_words(context.note.state.rows()))


def options(left_out: Path, on_gpu: bool) -> list[str]:
    """pytest's: no cache in the checkout, whatever fails the rest goes on, several processes where they help."""
    found = ["-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--rootdir={REPO}"]
    found += ["-c", str(REPO / "pyproject.toml"), f"--leave-out={left_out}"]
    workers = min(WORKERS, (os.cpu_count() or 1) // 2)
    if on_gpu and workers > 1 and importlib.util.find_spec("xdist"):
        found += ["-n", str(workers), "--dist", "worksteal", f"--max-worker-restart={50 * workers}"]
    return found


class Recorder:
    """A plugin of pytest that writes a row for each test, in the process that all reports come to."""

    def __init__(self, note: Notebook, recorded: set[str]) -> None:
        self.note, self.recorded = note, set(recorded)
        self._seconds: Counter[str] = Counter()
        self._skipped: set[str] = set()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Each of a test's phases; a process that died reports its test once more."""
        name = report.nodeid
        self._seconds[name] += report.duration
        if report.skipped:
            self._skipped.add(name)
        if report.failed:
            self._write(name, "failed", error_of(report))
        elif report.when == "teardown":
            self._write(name, "skipped" if name in self._skipped else "passed", None)

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported."""
        if report.failed:
            self._write(report.nodeid, "error", error_of(report))

    def _write(self, name: str, outcome: str, error: str | None) -> None:
        if name in self.recorded:
            return
        self.recorded.add(name)
        row: Row = {"test": name, "outcome": outcome, "seconds": round(self._seconds[name], 3), "error": error}
        self.note.row(row, f"{name}: {error}" if outcome in FAILED else None)


def error_of(report: Any) -> str:
    """The first lines that pytest marks as the error's; all lines where none is marked."""
    lines = str(report.longrepr).splitlines()
    marked = [line[1:].strip() for line in lines if line.startswith("E ")]
    return "\n".join((marked or lines)[:LONGEST])[:1000]


def tests_in_words(rows: Sequence[Row]) -> str:
    """Counts, and the first failures."""
    found = [row for row in rows if row["test"] is not None]
    counts = Counter(row["outcome"] for row in found)
    said = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "error", "skipped") if counts[outcome])
    failed = [row["test"] for row in found if row["outcome"] in FAILED]
    return (said or "no test ran") + (f"; first failure {failed[0]}" if failed else "")


TESTS = Piece("the tests that use a GPU, all failures collected", test_units, run_tests, tests_in_words)
