"""The examples that MM-Vet's judge is shown before an answer, read from MM-Vet's own file: its text is no part of this project."""

import ast
import json
from pathlib import Path

from fastllava.errors import UserError
from fastllava.evaluate.benchmark import Missing

NAMES = ("mm-vet_evaluator.py", "mm-vet_evaluator.ipynb", "mm-vet_prompt.txt")
"""What is looked for in the benchmark's folder: MM-Vet's script, its notebook, or the bare text."""
PROMPT_AT = "https://raw.githubusercontent.com/yuweihao/MM-Vet/main/mm-vet_evaluator.py"
_LARGEST = 4 * 2**20


def few_shot_prompt(data: Path, chosen: Path | None) -> str:
    """The text that comes before every answer to be judged: in `chosen`, else in the first of NAMES in `data`.

    Raises Missing when there is none, UserError when a script or notebook has no such text.
    """
    path = chosen or next((data / name for name in NAMES if (data / name).exists()), data / NAMES[0])
    if not path.exists():
        raise Missing(f"mm_vet: the judge's examples {path} are not there; download {PROMPT_AT} to that place")
    try:
        if path.stat().st_size > _LARGEST:
            raise UserError(f"{path} is larger than {_LARGEST // 2**20} MiB; take {PROMPT_AT}")
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is no UTF-8: {error.reason}"
        raise UserError(f"{path} cannot be read ({reason}); take {PROMPT_AT}") from None
    if path.suffix not in (".py", ".ipynb"):
        found = text.replace("\r\n", "\n")
    else:
        found = next(filter(None, map(_assigned, _cells(text) if path.suffix == ".ipynb" else [text])), None)
    if found is None or not found.strip():
        raise UserError(f"{path} holds no text for the judge (`prompt = ...`); take {PROMPT_AT}, or write the text alone into {NAMES[-1]}")
    return found


def _cells(notebook: str) -> list[str]:
    """The code of a notebook, without the lines that are for the notebook's shell."""
    try:
        sources = [cell["source"] for cell in json.loads(notebook)["cells"] if cell["cell_type"] == "code"]
        texts = [source if isinstance(source, str) else "".join(source) for source in sources]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    return ["\n".join(line for line in text.split("\n") if not line.startswith(("!", "%"))) for text in texts]


def _assigned(code: str) -> str | None:
    """The text that `code` first assigns to `prompt`; it is read, never run."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(one, ast.Name) and one.id == "prompt" for one in node.targets):
            value = node.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                return value.value
    return None
