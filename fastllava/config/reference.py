"""The page of every config key, docs/keys.md: `python -m fastllava.config.reference FILE` writes it (`make schema`).

Names, values, defaults and descriptions are those of the config's fields, so that there is no second list.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fastllava.config.keys import LEVER, SAME_TRAINING, STAGE_DEFAULTS, Config
from fastllava.config.strict_yaml import in_yaml

_TOP = """# Every config key

`make schema` writes this page from the program. The keys that matter most are explained in [configuration](config.md),
and the implementations of each op in [kernels](kernels.md). *Toggles* (T) keep the training the same, and *levers* (L)
change the numerics.
"""
_WORDS = {bool: ("true", "false"), int: ("whole number",), float: ("number",), str: ("text",), Path: ("path",), NoneType: ("null",)}


def keys_page() -> str:
    """The text of docs/keys.md: a table a section."""
    sections = {name: model for name, field in Config.model_fields.items() if (model := _section(field)) is not None}
    alone = [_row(name, name, field) for name, field in Config.model_fields.items() if name not in sections]
    parts = [_TOP, *_table("The run", "", alone)]
    for section, model in sections.items():
        rows = [_row(f"{section}.{name}", name, field) for name, field in model.model_fields.items()]
        parts += _table(f"`{section}`", model.__doc__ or "", rows)
    return "\n".join(parts)


def _table(heading: str, about: str, rows: list[str]) -> Iterator[str]:
    yield f"## {heading}\n"
    if about:
        yield f"{about}\n"
    yield from ("| key | values | default | what it is |", "|---|---|---|---|", *rows, "")


def _row(key: str, name: str, field: FieldInfo) -> str:
    mark = {SAME_TRAINING: " (T)", LEVER: " (L)"}.get(next((m for m in field.metadata if m in (SAME_TRAINING, LEVER)), ""), "")
    what = (field.description or "").replace("|", "\\|")
    return f"| `{key}`{mark} | {', '.join(_values(field.annotation))} | {_default(key, name, field)} | {what} |"


def _values(annotation: Any) -> list[str]:
    """What a key takes, in words: the values themselves where they are few."""
    if annotation in _WORDS:
        return list(_WORDS[annotation])
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return [f"`{value}`" for value in inner]
    if origin is list:
        return [f"list of {', '.join(_values(inner[0]))}"]
    if origin is dict:
        return ["an implementation, or one for each room"]
    # Annotated has its type first; a union has several.
    parts = inner[:1] if hasattr(annotation, "__metadata__") else inner
    return [word for part in parts for word in _values(part)]


def _default(key: str, name: str, field: FieldInfo) -> str:
    """What holds when the key is left out; of some keys each stage has its own."""
    section = key.removesuffix(name).rstrip(".")
    by_stage = {stage: defaults[section][name] for stage, defaults in STAGE_DEFAULTS.items() if name in defaults.get(section, {})}
    if by_stage:
        return ", ".join(f"{stage}: `{_plain(value)}`" for stage, value in by_stage.items())
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "`auto`" if key == "kernels" else "none" if value is None or value == [] else f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else in_yaml(value)


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that holds keys of its own."""
    inner = field.annotation
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(keys_page(), encoding="utf-8")
