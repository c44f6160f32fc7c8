"""The keys that every source of a mix has, and what the formats build their own from."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from fastllava.config.keys import FilePath, Section, Share
from fastllava.config.strict_yaml import in_yaml

__all__ = ["FileList", "FilePath", "Section", "Share", "SourceKeys"]


def _as_list(value: Any) -> Any:
    """One path as a list of one; a list as the tuple that strict types ask for."""
    if isinstance(value, list):
        return tuple(value)
    return value if isinstance(value, tuple) else (value,)


def _as_folder(value: Any) -> Any:
    """A folder below another one. Raises ValueError for a path that leads out of it."""
    if isinstance(value, str):
        value = value.strip("/") if value != "/" and not value.startswith("/") else value
        if value.startswith("/") or ".." in value.split("/") or "\0" in value:
            raise ValueError(f"{in_yaml(value)} leads out of the images folder of the mix; write the part below it, such as coco/train2017")
    return value


_FILE_OR_FILES = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
FileList = Annotated[tuple[FilePath, ...], BeforeValidator(_as_list), Field(min_length=1), WithJsonSchema(_FILE_OR_FILES)]
Folder = Annotated[str, BeforeValidator(_as_folder)]


class SourceKeys(Section):
    """What every source has, whatever its format."""

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$", description="what the source is called in the report; letters, digits, _ . -")
    format: str
    images: Folder = Field(
        default="", description="the folder of its images, below `images` of the mix; stands before each path in the records"
    )
    sample: int | None = Field(default=None, ge=1, description="at most so many records, drawn from all; all when left out")
    seed: int | None = Field(default=None, description="of this source's draws; that of the mix when left out")
    expect: int | None = Field(
        default=None, ge=0, description="the records there must be before images are looked for; another number stops the build"
    )
    published: int | None = Field(default=None, ge=0, description="the records that a publication names; told beside the number found")
