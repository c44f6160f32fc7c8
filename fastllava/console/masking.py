"""What nobody but its owner should read is masked in whatever a run writes, says or sends: passwords in addresses, tokens, keys.

Three kinds: what looks like one by its form; what follows a name that says so; and the values that the environment holds under
such a name, wherever they turn up.
"""

import glob
import os
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

MASK = "***"

_NAME = r"(?:[a-z0-9]+[_.-])*(?:token|password|passwd|passphrase|secret|api_?key|access_?key|private_?key|secret_?key|credentials?)"
_IN_AN_ADDRESS = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*:/{1,2})[^/\s'\"]+@(?=[^/\s])")
_USER_AND_PASSWORD = re.compile(r"(?<![^\s/'\"=])[^\s/:@'\"]+:[^\s/@'\"]+@(?=[\w\[])")
_AFTER_A_NAME = re.compile(rf"(?i)(?<![a-z0-9])({_NAME}=['\"]?|(?:password|passwd|api_?key)['\"]?:\s*['\"]?)(?![\s'\"])[^\s'\"&;,]+")
_BY_FORM = re.compile(
    r"\b(?:hf_\w{16,}|sk-[\w-]{16,}|gh[opsur]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}"
    r"|AKIA[A-Z0-9]{12,}|wandb_v1_\w{16,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,})"
)
_SECRET_KEY = re.compile(rf"(?i)^{_NAME}$")
_SECRET_VARIABLE = re.compile(r"(?i)(?:^|_)(?:token|password|passwd|passphrase|secret|(?:api|access|secret|private)_?key|credentials?)$")
_SHORTEST = 8
"""Characters of an environment's secret: a shorter one would mask words that mean something else."""


def masked(text: str) -> str:
    """`text` without the secrets in it."""
    for secret in _of_the_environment():
        text = text.replace(secret, MASK)
    if ":/" in text:
        text = _IN_AN_ADDRESS.sub(rf"\g<1>{MASK}@", text)
    if "=" in text or ":" in text:
        text = _AFTER_A_NAME.sub(rf"\g<1>{MASK}", text)
    return _BY_FORM.sub(MASK, text)


def masked_values(value: Any, name: str = "") -> Any:
    """`value`, of a config or the like, with every secret in its texts masked, and whole what a key such as `api_key` holds."""
    if isinstance(value, dict):
        return {key: masked_values(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [masked_values(inner, name) for inner in value]
    if not isinstance(value, str):
        return value
    return MASK if value and _SECRET_KEY.match(name) else _USER_AND_PASSWORD.sub(f"{MASK}@", masked(value))


def paths_behind(path: Path) -> list[Path]:
    """Find what `path` can have been before a part of it was masked: itself where it exists or nothing was, else all that are there."""
    if MASK not in str(path) or path.exists():
        return [path]
    pattern = "*".join(map(glob.escape, str(path).split(MASK)))
    return sorted(map(Path, glob.glob(pattern)))


def _of_the_environment() -> Iterable[str]:
    return _secrets_in(tuple(os.environ.items()))


@lru_cache(1)
def _secrets_in(variables: tuple[tuple[str, str], ...]) -> list[str]:
    """The longest first, as one may be part of another. A path is where a secret lies, not the secret."""
    found = {value for name, value in variables if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST and not value.startswith("/")}
    return sorted(found, key=len, reverse=True)
