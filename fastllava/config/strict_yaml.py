"""YAML as configs are written in it: safe, no key twice, and numbers that mean what they say."""

import re
from typing import Any

import yaml

from fastllava.console.masking import masked_values
from fastllava.console.printable import shortened
from fastllava.errors import UserError

_LOOKED_AT = 2000
"""Characters of a value that a message could show a part of."""


class _Loader(yaml.SafeLoader):
    """Constructs plain data only, and refuses a key given twice."""

    # In place of YAML 1.1's scalars, which read 1e-3 as text, 010 as 8, 1:30 as 90, 2024-01-01 as a date, and on, off, yes and no as bool.
    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (PyYAML's name and type)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", r"[-+]?((\d[\d_]*\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+)", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key, _ in node.value:
        # What '<<' merges in may be overridden beside it: that is what it is for.
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' is given twice", key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def parse_yaml(text: str, where: str) -> Any:
    """The value of `text`: mappings, lists, str, int, float, bool, None. Raises UserError that begins with `where` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark and "\n" in text.strip() else ""
        problem = shortened(str(error.problem))
        raise UserError(f"{where}{line}: is not valid YAML ({problem}); mend it, or put the value in quotes") from None
    except ValueError:
        raise UserError(f"{where}: holds a number of thousands of digits; write one that fits, or put the value in quotes") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: is not valid YAML ({' '.join(str(error).split())}); save it as plain text") from None
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply; a config is a few levels of keys") from None


def in_yaml(value: Any) -> str:
    """`value` on one line as a user would write it, without secrets, cut at 80 characters."""
    if isinstance(value, str):
        value = masked_values(value[:_LOOKED_AT])
        text = f"'{value}'" if value.isprintable() else repr(value)
    elif value is None or isinstance(value, bool | int | float | list | dict):
        text = " ".join(yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("...\n").split())
    else:
        text = repr(value)
    text = masked_values(text[:_LOOKED_AT])
    return text if len(text) <= 80 else f"{text[:77]}..."
