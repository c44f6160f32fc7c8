"""Reads a run's configuration: YAML plus `key=value` overrides, checked as a whole before anything starts.

`load_config` merges the stage's defaults (the official recipe), the file and the overrides, in this order.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fastllava.config.keys import SECTIONS, STAGE_DEFAULTS, Config, default_values, key_names
from fastllava.config.problems import in_words
from fastllava.config.strict_yaml import in_yaml, parse_yaml
from fastllava.console.masking import masked_values
from fastllava.console.printable import quoted
from fastllava.errors import UserError
from fastllava_kernels import rooms

SHIPPED = Path(__file__).resolve().parents[1] / "configs"
"""The folder of the configs that come with the package: the repository's configs/."""


def shipped(path: Path) -> Path | None:
    """The shipped config that `path` names, such as llava15_7b_pretrain or configs/llava15_7b_pretrain.yaml.

    None where `path` is there itself, and where it names none.
    """
    file = SHIPPED / f"{path.name.removesuffix('.yaml')}.yaml"
    return file if not path.exists() and path.parent in (Path(), Path("configs")) and file.is_file() else None


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration from the YAML file at `path` and `key=value` words such as `optim.lr=2e-5`.

    A `path` that is not there may be the name of a shipped config, as `shipped` finds it. Raises UserError that lists every problem,
    each in one line that names the key, what was given and what to write.
    """
    path = Path(path)
    try:
        given = parse_yaml((shipped(path) or path).read_text(encoding="utf-8"), str(path))
    except OSError as error:
        names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml") if not file.name.startswith("mix")))
        mend = f"give the path of a YAML config, or the name of a shipped one: {names}"
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {mend}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not text in UTF-8; give the path of a YAML config") from None
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise UserError(f"{path}: holds {in_yaml(given)}, not keys; a config holds lines such as 'stage: pretrain'")
    for word in overrides:
        _set_override(given, word)
    return check_config(given)


def check_config(given: Mapping[str, Any]) -> Config:
    """A Config from a plain mapping; the stage's defaults fill what it leaves out. Raises UserError like `load_config`."""
    defaults = STAGE_DEFAULTS.get(str(given.get("stage")), {})
    merged: dict[str, Any] = dict(given)
    for section in SECTIONS:
        # A section whose keys are all commented out reads as null.
        value = {} if merged.get(section) is None else merged[section]
        merged[section] = {**defaults.get(section, {}), **value} if isinstance(value, Mapping) else value
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        # Without a stage there are no defaults, and complaints about missing keys would hide the one that matters.
        problems = [p for p in error.errors() if defaults or p["type"] != "missing" or p["loc"] == ("stage",)]
        raise UserError(in_words(problems, list(key_names()), dict(default_values()))) from None


def as_written(config: Config) -> dict[str, Any]:
    """`config` as plain values for what a run writes, says or sends: without secrets."""
    return masked_values(config.model_dump(mode="json"))


def resolved(config: Config) -> str:
    """The YAML of `config` with every key, those that were left out too; `load_config` reads it as the same config.

    Secrets in it, such as a password in an address, are masked, as in whatever a run writes.
    """
    return yaml.safe_dump(as_written(config), sort_keys=False, allow_unicode=True, width=10**6)


def _set_override(given: dict[str, Any], word: str) -> None:
    key, separator, text = word.partition("=")
    named = f"override {quoted(word)}"
    if not separator or not all(key.split(".")):
        raise UserError(f"{named}: is not of the form key=value; write for example optim.lr=2e-5")
    *sections, name = key.split(".")
    target = given
    for section in sections:
        inner: Any = target.get(section)
        if section == "kernels" and isinstance(inner, str):
            inner = dict.fromkeys(rooms(), inner)
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise UserError(f"{named}: {section} holds {in_yaml(inner)} and has no keys of its own; write {section}=VALUE")
        # A copy: YAML anchors may have put one mapping in two places.
        inner = dict(inner)
        target[section] = inner
        target = inner
    target[name] = parse_yaml(text, named)
