"""Tries the regular expressions of a tokenizer.json in a process of their own, before any text is trusted to them.

Some expressions take exponential time over plain text, and the engine then breaks off or seems to hang; there is no way
to stop it from outside but to end its process.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from fastllava.errors import UserError

# Of Llama 3 and GPT-4, and of Qwen 2: seen to be linear.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_KNOWN = {_WORDS + r"\p{N}{1,3}" + _REST, _WORDS + r"\p{N}" + _REST}
_SECONDS = 20.0
_TRY = """
import sys, tokenizers
model = tokenizers.Tokenizer.from_str(sys.stdin.buffer.read().decode())
for unit in ("a", "A", "1", " ", ".", "-", "'", "\\n", "\\t", "_", "a ", "A chat, between a curious user. ", "a1", "é", "好", "<a>"):
    for end in ("", "!", "\\x00"):
        model.encode(unit * (2000 // len(unit)) + end)
"""


def check_patterns(model: bytes, where: str) -> None:
    """Raises UserError where an expression of the tokenizer.json `model` breaks off or takes too long on plain texts."""
    try:
        spec = json.loads(model)
        unknown = any(pattern not in _KNOWN for pattern in _patterns([spec.get("normalizer"), spec.get("pre_tokenizer")]))
    except (ValueError, AttributeError, RecursionError):
        return  # Said in its own words when the file is loaded.
    if not unknown:
        return
    try:
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-I", "-c", _TRY], input=model, capture_output=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{where}: {_WHAT} takes longer than {_SECONDS:g} s over 2,000 characters of plain text; {_REMEDY}") from None
    if done.returncode and b"Onig" in done.stderr:
        raise UserError(f"{where}: {_WHAT} breaks off over 2,000 characters of plain text; {_REMEDY}")


_WHAT = "a regular expression of its pre_tokenizer or normalizer"
_REMEDY = "give the tokenizer.json that belongs to the model, or one with a simpler expression"


def _patterns(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("Regex"), str):
            yield part["Regex"]
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            yield from _patterns(inner)
