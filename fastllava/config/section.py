"""What the sections of a configuration have in common: their base, and the types of several of them."""

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from fastllava.config.strict_yaml import in_yaml


def as_path(value: Any) -> Path:
    """A path as a config gives it. Raises ValueError in words for the user."""
    if isinstance(value, Path):
        return value
    if value is None or value == "":
        raise ValueError("is empty; write a path")
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"{in_yaml(value)} is no path; write one, in quotes when it looks like a number")
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        # A locale that knows ASCII alone: the file's name is in UTF-8 nevertheless, as the config is.
        value = os.fsdecode(value.encode("utf-8", "surrogateescape"))
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise ValueError(f"{in_yaml(value)} begins with the home of an unknown user; write the whole path") from None


FilePath = Annotated[Path, BeforeValidator(as_path)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Keys that lie together: fixed once checked, none unknown, no value of another type taken for what it is not."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
