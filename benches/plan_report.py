"""The table of docs/planning.md that `fastllava plan --json FILE` is behind: what is foreseen of runs that nobody has made."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benches.results import RESULTS

GIB = 2**30

Stage = Mapping[str, Any]


def table(results: Path = RESULTS) -> str:
    """Markdown: for each results/plan*.json a line a stage, and the sum."""
    lines = [
        "| predicted | stage | samples | steps | recompute | tokens a micro-batch | memory, GiB | s a step | MFU | hours | limited by |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(results.glob("plan*.json")):
        stages = json.loads(path.read_text(encoding="utf-8"))
        name = _name(stages[0])
        lines += [_line(name, stage) for stage in stages]
        if len(stages) > 1 and all(stage["chosen"] for stage in stages):
            hours = sum(stage["hours"] for stage in stages)
            gpu_hours = sum(stage["gpu_hours"] for stage in stages)
            lines.append(f"| {name} | **both** | | | | | | | | **{hours:.1f}** | {gpu_hours:.0f} GPU-hours |")
    return "\n".join(lines)


def _name(stage: Stage) -> str:
    """Such as "7B on 8 x a100-80g"."""
    return f"{sum(stage['parameters'].values()) / 1e9:.0f}B on {stage['world']} x {stage['gpu']}"


def _line(name: str, stage: Stage) -> str:
    best = stage["chosen"]
    cells = [name, stage["stage"], f"{stage['samples']:,}", f"{stage['steps']:,}"]
    if best is None:
        cells += ["-"] * 6 + [stage["limit"]]
    else:
        cells += [
            *(best["recompute"], f"{best['micro_batch_tokens']:,}"),
            f"{best['peak_memory_bytes'] / GIB:.0f} of {stage['room_bytes'] / GIB:.0f}",
            *(f"{best['step_seconds']:.2f}", f"{best['mfu']:.0%}", f"{stage['hours']:.1f}", stage["limit"]),
        ]
    return f"| {' | '.join(cells)} |"
