"""The JSON schema of a config, for editors: `python -m fastllava.config.schema FILE` writes it (`make schema`).

The shipped copy is `configs/schema.json`; a config that begins with `# yaml-language-server: $schema=schema.json` is
completed and checked while it is typed.
"""

import json
import sys
from pathlib import Path
from typing import Any

from fastllava.config.keys import STAGE_DEFAULTS, Config
from fastllava_kernels import rooms


def config_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of what a config file may hold; nothing is required that has a default of its own or of the stage."""
    schema = Config.model_json_schema()
    for section in schema["properties"].keys() & schema["required"]:
        definition = _definition(schema, section)
        from_stage = set.intersection(*(set(defaults.get(section, {})) for defaults in STAGE_DEFAULTS.values()))
        definition["required"] = [key for key in definition.get("required", []) if key not in from_stage]
    schema["required"] = [key for key in schema["required"] if _definition(schema, key).get("required") != []]
    schema["properties"]["kernels"] = _kernels()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "fastllava config"}


def schema_text() -> str:
    """The text of `configs/schema.json`."""
    return json.dumps(config_schema(), indent=2) + "\n"


def _definition(schema: dict[str, Any], section: str) -> dict[str, Any]:
    """Where the keys of a section stand; an empty definition for a plain value such as `stage`."""
    reference = schema["properties"][section].get("$ref", "")
    return schema["$defs"].get(reference.rpartition("/")[2], {})


def _kernels() -> dict[str, Any]:
    """One word for every room, or an implementation by room; both read from the rooms."""
    by_room = {name: {"description": room.summary, "enum": list(room.values)} for name, room in rooms().items()}
    for_all = sorted(set.intersection(*(set(names["enum"]) for names in by_room.values())))
    return {
        "description": Config.model_fields["kernels"].description,
        "anyOf": [{"enum": for_all}, {"type": "object", "additionalProperties": False, "properties": by_room}],
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(schema_text(), encoding="utf-8")
