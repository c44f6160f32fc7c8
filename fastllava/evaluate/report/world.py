"""What a run was made with: versions, device, commit, kernels, and where its parts lie."""

from collections.abc import Mapping
from typing import Any

from fastllava.evaluate.report.page import Section, fill
from fastllava.evaluate.report.run import Run
from fastllava.evaluate.report.training import duration


def section(run: Run) -> Section:
    """Tables of it; a run tells it when a process of it ends."""
    return Section("world", "Versions and machine", fill("world.html", facts=_facts(run), kernels=_kernels(run), known=bool(run.summary)))


def _facts(run: Run) -> list[tuple[str, str]]:
    summary, versions = run.summary, run.summary.get("versions")
    facts: list[tuple[str, Any]] = [
        ("folder", run.folder.resolve()),
        ("run", summary.get("run")),
        ("commit", summary.get("commit")),
        ("processes", summary.get("processes")),
        (
            "wall time of its last process",
            duration(summary["wall_seconds"]) if isinstance(summary.get("wall_seconds"), int | float) else None,
        ),
        ("prepared set", summary.get("prepared")),
        ("digest of the prepared set", summary.get("prepared_digest")),
    ]
    facts += sorted(versions.items()) if isinstance(versions, dict) else []
    start = summary.get("start")
    for key, part in sorted(start.items()) if isinstance(start, dict) else ():
        if isinstance(part, Mapping):
            facts.append((f"sha256 of {key}", part.get("weights")))
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _kernels(run: Run) -> list[tuple[str, str]]:
    kernels = run.summary.get("kernels")
    if not isinstance(kernels, dict):
        return []
    return [(name, str(use.get("implementation"))) for name, use in sorted(kernels.items()) if isinstance(use, dict)]
