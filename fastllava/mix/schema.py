"""The JSON schema of a mix, for editors: `python -m fastllava.mix.schema FILE` writes it (`make schema`).

The shipped copy is `configs/mix-schema.json`; a mix that begins with `# yaml-language-server: $schema=mix-schema.json`
is completed and checked while it is typed.
"""

import json
import sys
from pathlib import Path

from fastllava.mix.config import whole_model


def schema_text() -> str:
    """The text of `configs/mix-schema.json`."""
    schema = whole_model().model_json_schema()
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "fastllava mix"}, indent=2) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(schema_text(), encoding="utf-8")
