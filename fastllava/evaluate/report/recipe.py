"""A run's config against the shipped one of its stage, which is the official recipe: what differs, and what that changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from fastllava.config import load_config
from fastllava.config.keys import LEVER, Config, key_names, marked
from fastllava.config.load import as_written
from fastllava.config.strict_yaml import in_yaml
from fastllava.evaluate.report.page import Notice, Section, fill
from fastllava.evaluate.report.run import Run
from fastllava.train.state.resume import PLACES, changes_nothing, changes_rounding

Effect = Literal["training", "lever", "inputs", "rounding", "nothing"]
EFFECTS: Mapping[Effect, str] = {
    "training": "Another training: losses and weights are not those of the recipe",
    "lever": "Another training: accuracy is traded for memory or time",
    "inputs": "Another model, or other data",
    "rounding": "The same training, in another order of additions",
    "nothing": "No bit of the result",
}
"""What a difference does to the numbers, the weightiest first."""
_INPUTS = PLACES | {"model.adapter", "data.records", "data.images", "eval.held_out"}
_WIDTH_OF_13B = 5120
_MISSING = object()


@dataclass(frozen=True)
class Difference:
    """A key whose value is not that of the recipe."""

    key: str
    here: str
    recipe: str
    effect: Effect


def recipe_of(run: Run) -> str | None:
    """The name of the shipped config that a run is compared with; None where its stage is not known."""
    if run.stage not in ("pretrain", "finetune"):
        return None
    start = run.summary.get("start")
    llm = start.get("model.llm") if isinstance(start, dict) else None
    config = llm.get("config") if isinstance(llm, dict) else None
    width = config.get("hidden_size") if isinstance(config, dict) else None
    model = run.written.get("model")
    named = "13b" in str(model.get("llm") if isinstance(model, dict) else "").lower()
    size = "13b" if width == _WIDTH_OF_13B or (width is None and named) else "7b"
    lora = run.written.get("lora")
    if run.stage == "pretrain" or not isinstance(lora, dict) or lora.get("rank") is None:
        return f"llava15_{size}_{run.stage}"
    # On a whole LLaVA, which brings its projector, it is training for a task.
    begins = [model.get(key) for key in ("projector", "adapter")] if isinstance(model, dict) else []
    return f"llava15_{size}_finetune_{'lora' if any(begins) else 'task_lora'}"


def differences(written: Mapping[str, Any], recipe: str) -> list[Difference]:
    """The keys of the config `written` that differ from the shipped config `recipe`, the weightiest first.

    Paths to a model or to data differ where their last part does. Keys that either of them lacks are of another version, and left out.
    """
    mine, official = _flat(written), _flat(as_written(load_config(recipe)))
    found = []
    for key in _order(mine):
        here, there = mine[key], official.get(key, _MISSING)
        if there is _MISSING or here == there or (key in _INPUTS and _last(here) == _last(there)):
            continue
        found.append(Difference(key, in_yaml(here), in_yaml(there), effect_of(key, here)))
    rank = list(EFFECTS)
    return sorted(found, key=lambda one: rank.index(one.effect))


def effect_of(key: str, value: Any) -> Effect:
    """What another `value` of `key` than the recipe's does."""
    if key == "eval.held_out":
        # A share of the records is taken out of the training; a file of others is not.
        return "inputs" if isinstance(value, float) else "nothing"
    if key in _INPUTS:
        return "inputs"
    if changes_nothing(key):
        return "nothing"
    if changes_rounding(key):
        return "rounding"
    return "lever" if key in {name for name, _ in marked(LEVER)} else "training"


def section(run: Run) -> Section:
    """The table of differences, by what they change."""
    name = recipe_of(run)
    found = differences(run.written, name) if name is not None else []
    groups = [(EFFECTS[effect], effect, [one for one in found if one.effect == effect]) for effect in EFFECTS]
    body = fill(
        "recipe.html", name=name, groups=[group for group in groups if group[2]], same=not found, total=len(list(key_names(Config)))
    )
    return Section("recipe", "Config against the official recipe", body)


def notices(run: Run) -> list[Notice]:
    """Which keys make it another training than the recipe's."""
    name = recipe_of(run)
    if name is None or not run.written:
        return []
    keys = [one.key for one in differences(run.written, name) if one.effect in ("training", "lever")]
    if not keys:
        return [Notice(f"The training is that of the official recipe ({name}): no key differs that changes its numbers.")]
    return [Notice(f"Not the official recipe ({name}): {_listed(keys)} {'differs' if len(keys) == 1 else 'differ'}.")]


def _listed(keys: Sequence[str], most: int = 8) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more keys" if len(keys) > most else "")


def _last(value: Any) -> Any:
    return PurePath(value).name if isinstance(value, str) else value


def _order(flat: Mapping[str, Any]) -> list[str]:
    """The keys in the order of the config's reference; those of another version last."""
    known = {key: number for number, key in enumerate(key_names(Config))}
    return sorted(flat, key=lambda key: (known.get(key.split(".")[0] if key.startswith("kernels.") else key, len(known)), key))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
