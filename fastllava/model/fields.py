"""Fields of a config.json that must be numbers."""

from collections.abc import Mapping
from typing import Any

from fastllava.errors import UserError


def positive(config: Mapping[str, Any], name: str, where: str, kind: type) -> Any:
    """The positive number, whole where `kind` is int, that `config` has under `name`. `where` begins the UserError for another value."""
    value = config.get(name)
    fits = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if not fits or value <= 0:  # pyright: ignore[reportOptionalOperand]
        raise UserError(f"{where}: {name} is {value!r}; a positive {'number' if kind is float else 'whole number'} is needed")
    return value
