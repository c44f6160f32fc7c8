"""`fastllava bench tests`: the tests that use a GPU where there is one, a row each, all failures collected.

With `resume`, a test that has a row is not run again: a run that was stopped, or whose GPU a test broke, goes on with the rest.
"""

import importlib.util
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benches.lib.results import Row, Sheet
from benches.lib.unattended import LOST_GPU
from benches.lib.world import REPO, SOURCES, check_device, world
from fastllava.errors import UserError

FOLDERS = ("tests/kernels", "tests/training", "tests/model")
"""What runs on a GPU where there is one, and the models that the kernels are for; the most telling first."""
TESTED = (*SOURCES, "tests/**/*.py")
FAILED = ("failed", "error")
WORKERS = 8
"""At most: a test's truth is computed on the host, and the GPU is shared."""
LONGEST = 8
"""Lines of an error that are kept."""


def bench(device: torch.device, sheet: Sheet, paths: Sequence[str] = ()) -> int:
    """Run the tests of these paths, and write a row for each as it ends and one of totals.

    The exit code: 0; 1 when one failed; LOST_GPU, as pytest's own then (tests/conftest.py), when one left the GPU unusable.
    """
    check_device(device)
    for path in paths:
        if not (REPO / path.partition("::")[0]).exists():
            raise UserError(f"bench tests: {path} is not there; write paths from the checkout's root, such as tests/kernels")
    on_gpu = device.type == "cuda"
    if on_gpu:
        # Inductor takes a process a core for itself, and here it runs in several.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
    recorder = Recorder(sheet)
    with tempfile.TemporaryDirectory() as folder:
        left_out = Path(folder, "recorded.txt")
        left_out.write_text("".join(f"{name}\n" for name in sorted(recorder.recorded)), encoding="utf-8")
        code = pytest.main([*options(left_out, on_gpu), *(str(REPO / path) for path in paths or FOLDERS)], plugins=[recorder])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        sheet.say(f"pytest ended with {code}")
        return LOST_GPU if code == LOST_GPU else 1
    found = [row for row in (*sheet.known, *sheet.rows) if row["test"] is not None]
    totals = dict(Counter(row["outcome"] for row in found)) | {"seconds": round(sum(row["seconds"] for row in found), 2)}
    sheet.add({"test": None, "outcome": "totals", "of": list(paths or FOLDERS), **totals, **world(device)}, lambda _: in_words(found))
    return int(any(row["outcome"] in FAILED for row in found))


def options(left_out: Path, on_gpu: bool) -> list[str]:
    """pytest's options: no cache in the checkout, whatever fails the rest goes on, several processes where they help."""
    found = ["-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--rootdir={REPO}"]
    found += ["-c", str(REPO / "pyproject.toml"), f"--leave-out={left_out}"]
    workers = min(WORKERS, (os.cpu_count() or 1) // 2)
    if on_gpu and workers > 1 and importlib.util.find_spec("xdist"):
        found += ["-n", str(workers), "--dist", "worksteal", f"--max-worker-restart={50 * workers}"]
    return found


class Recorder:
    """A plugin of pytest that writes a row for each test, in the process that all reports come to."""

    def __init__(self, sheet: Sheet) -> None:
        self.sheet, self.recorded = sheet, {row["test"] for row in sheet.known if row["test"] is not None}
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
        if name not in self.recorded:
            self.recorded.add(name)
            self.sheet.add({"test": name, "outcome": outcome, "seconds": round(self._seconds[name], 3), "error": error})


def error_of(report: Any) -> str:
    """The first lines that pytest marks as the error's; all lines where none is marked."""
    lines = str(report.longrepr).splitlines()
    marked = [line[1:].strip() for line in lines if line.startswith("E ")]
    return "\n".join((marked or lines)[:LONGEST])[:1000]


def in_words(rows: Sequence[Row]) -> str:
    """Counts, and the first failure."""
    counts = Counter(row["outcome"] for row in rows)
    said = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "error", "skipped") if counts[outcome])
    failed = [row["test"] for row in rows if row["outcome"] in FAILED]
    return (said or "no test ran") + (f"; first failure {failed[0]}" if failed else "")
