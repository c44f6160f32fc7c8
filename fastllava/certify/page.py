"""The certificate as one page of text and as JSON; both say the same."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastllava.certify.judge import ALL, COMPARISONS, FLOOR, LOSS, SLACK, Comparison, Figures, Judged, kind_of
from fastllava.certify.variants import TRUTH, VARIANTS
from fastllava.model.execution import COMPUTE_DTYPE

_SENTENCE = "loss and every gradient of this run are as near to the truth as those of plain PyTorch in the same precision"
_STEPS_SHOWN = 3
_IDS_SHOWN = 4
_BESIDE = ("configured", "packed", "single", "plain")


@dataclass(frozen=True)
class Certificate:
    """What was run and what was found."""

    facts: Mapping[str, Any]
    """What identifies the run and the machine; JSON."""
    steps: Sequence[Mapping[str, Any]]
    """Each step's `step`, `samples` of `of`, `from`, `ids`, `tokens`, `supervised`, `images`, `micro_batches`, `seconds` by variant."""
    figures: Sequence[Mapping[str, Mapping[str, Figures]]]
    """The figures of each step by variant, the truth included, and by name."""
    judged: Sequence[Judged]

    @property
    def holds(self) -> bool:
        """Whether everything does."""
        return all(each.holds for each in self.judged)

    def failures(self, comparison: Comparison | None = None) -> list[Judged]:
        """What does not, the worst first."""
        wrong = [each for each in self.judged if not each.holds and comparison in (None, each.comparison)]
        return sorted(wrong, key=lambda each: -each.used)

    def verdict(self) -> str:
        """One sentence."""
        if self.holds:
            return f"HOLDS: {_SENTENCE}"
        names = [comparison.name for comparison in COMPARISONS if self.failures(comparison)]
        worst = self.failures()[0]
        return f"FAILS in {', '.join(names)}: {worst.comparison.name}, step {worst.step}, {worst.name}: {worst.problem}"


def lines(certificate: Certificate) -> Iterator[str]:
    """The page, at most about sixty lines for any model."""
    yield "fastllava certificate"
    yield certificate.verdict()
    yield ""
    yield from _facts(certificate.facts)
    yield from _steps(certificate.steps)
    yield ""
    yield "Computed, each from the weights as read; no weight moved:"
    for name, what in VARIANTS.items():
        yield f"  {name:11} {what}"
    yield ""
    yield from _losses(certificate)
    yield ""
    yield from _gradients(certificate)
    yield ""
    yield from _comparisons(certificate)
    yield ""
    yield certificate.verdict()


def as_json(certificate: Certificate) -> dict[str, Any]:
    """All of it, every parameter by itself. Numbers that are not finite are words."""
    return {
        "holds": certificate.holds,
        "verdict": certificate.verdict(),
        **certificate.facts,
        "variants": dict(VARIANTS),
        "comparisons": [
            {"name": c.name, "what": c.what, "judged": c.judged, "beside": c.beside, "holds": not certificate.failures(c)}
            for c in COMPARISONS
        ],
        "steps": [
            {**step, "figures": {variant: {name: _plain(f) for name, f in found.items()} for variant, found in figures.items()}}
            for step, figures in zip(certificate.steps, certificate.figures, strict=True)
        ],
        "judged": [
            {
                "comparison": each.comparison.name,
                "step": each.step,
                "name": each.name,
                "error": _finite(each.found.error) if each.found else None,
                "beside": _finite(each.beside.error) if each.beside else None,
                "allowed": _finite(each.allowed),
                "used": _finite(each.used),
                "problem": each.problem,
            }
            for each in certificate.judged
        ],
    }


def _facts(facts: Mapping[str, Any]) -> Iterator[str]:
    versions, model, data = facts["versions"], facts["model"], facts["data"]
    software = ", ".join(f"{name} {version}" for name, version in versions.items() if name not in ("device", "machine"))
    yield f"run      stage {facts['stage']}, {facts['precision']}, truth in {facts['truth']}; config {facts['config_sha256'][:16]}"
    yield f"setting  {', '.join(f'{key}={str(value).lower()}' for key, value in facts['settings'].items())}"
    yield f"kernels  {', '.join(f'{room}={use}' for room, use in facts['kernels'].items())}"
    yield f"model    {model['llm']}; tower {model['vision_tower']}; projector {model['projector']}"
    yield f"         {model['trained']:,} parameters train, {model['frozen']:,} are frozen; weights {model['weights_sha256'][:16]}"
    if facts["lora"]:
        yield f"lora     {facts['lora']}"
    yield f"data     {data['records']}, prepared set {data['prepared_digest'][:16]}, {data['samples']:,} samples"
    yield f"machine  {facts['device']}, {versions['device']}, {versions['machine']}; {software}; commit {facts['commit'] or 'unknown'}"


def _steps(steps: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for step in steps[:_STEPS_SHOWN]:
        ids = ", ".join(step["ids"][:_IDS_SHOWN]) + (", ..." if len(step["ids"]) > _IDS_SHOWN else "")
        yield (
            f"step {step['step']:<4} {step['samples']} of its {step['of']} samples, from number {step['from']} on ({ids}): "
            f"{step['tokens']:,} tokens, {step['supervised']:,} supervised, {step['images']} images, {step['micro_batches']} micro-batches"
        )
    if len(steps) > _STEPS_SHOWN:
        yield f"         and {len(steps) - _STEPS_SHOWN} steps more"


def _losses(certificate: Certificate) -> Iterator[str]:
    yield f"{'step':5} {'':13} {TRUTH:>12} " + " ".join(f"{variant:>10}" for variant in _BESIDE) + "   (distance from the truth)"
    pairs = list(zip(certificate.steps, certificate.figures, strict=True))
    worst = sorted(pairs, key=lambda pair: -max(_sort_key(pair[1][variant][LOSS].error) for variant in _BESIDE))[:_STEPS_SHOWN]
    for step, figures in sorted(worst, key=lambda pair: pair[0]["step"]):
        for name in (LOSS, ALL):
            errors = " ".join(f"{figures[variant][name].error:10.1e}" for variant in _BESIDE)
            yield f"{step['step']:<5} {name:13} {figures[TRUTH][name].norm:12.6g} {errors}"
    if len(pairs) > len(worst):
        yield f"      the {len(worst)} steps with the largest distances"


def _gradients(certificate: Certificate) -> Iterator[str]:
    """A line for each kind of parameter: the one layer and step that comes nearest to what is allowed, or goes farthest beyond."""
    worst: dict[str, Judged] = {}
    for each in certificate.judged:
        if each.name in (LOSS, ALL):
            continue
        kind, _ = kind_of(each.name)
        if kind not in worst or _sort_key(each.used) > _sort_key(worst[kind].used):
            worst[kind] = each
    figures = {step["step"]: found for step, found in zip(certificate.steps, certificate.figures, strict=True)}
    yield f"{'gradient of':30} " + " ".join(f"{variant:>10}" for variant in _BESIDE) + f" {'cosine':>8} {'used':>6}  worst at"
    for kind, each in worst.items():
        found = figures[each.step]
        errors = " ".join(_error(found[variant].get(each.name)) for variant in _BESIDE)
        layer = kind_of(each.name)[1]
        place = (f"layer {layer}, " if layer else "") + f"step {each.step}, {each.comparison.name}"
        yield f"{kind:30} {errors} {_cosine(each.found)} {_percent(each.used):>6}  {place}{'' if each.holds else '  FAILS'}"


def _comparisons(certificate: Certificate) -> Iterator[str]:
    floor = FLOOR[COMPUTE_DTYPE[certificate.facts["precision"]]]
    yield f"Allowed: {SLACK} times the other's distance, more where few numbers average, and {floor:.1e}; 'used' is the share of that:"
    for comparison in COMPARISONS:
        failed = certificate.failures(comparison)
        found = f"; {len(failed)} findings, the worst {failed[0].name} in step {failed[0].step}" if failed else ""
        yield f"  {comparison.name:8} {'FAILS' if failed else 'holds'}  {comparison.what}{found}"


def _sort_key(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _error(figures: Figures | None) -> str:
    return f"{figures.error:10.1e}" if figures else f"{'none':>10}"


def _cosine(figures: Figures | None) -> str:
    return f"{figures.cosine:8.6f}" if figures and figures.cosine is not None else f"{'zero':>8}"


def _percent(used: float) -> str:
    return f"{used:.0%}" if math.isfinite(used) and used < 100 else "> 100x"


def _plain(figures: Figures) -> dict[str, Any]:
    return {key: _finite(value) for key, value in vars(figures).items()}


def _finite(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
