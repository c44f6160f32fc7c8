"""Reads the YAML of a mix, checked as a whole before anything is read or written."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import BeforeValidator, Field, ValidationError, create_model

from fastllava.config.keys import MOST_IMAGES
from fastllava.config.problems import did_you_mean, in_words
from fastllava.config.strict_yaml import in_yaml, parse_yaml
from fastllava.console.printable import quoted
from fastllava.errors import UserError
from fastllava.mix.keys import FilePath, Section, Share, SourceKeys
from fastllava.mix.sources import FORMATS


class MixKeys(Section):
    """What holds for all sources."""

    seed: int = Field(default=0, description="of every draw; the same seed, files and config give the same mix, byte for byte")
    images: FilePath | None = Field(
        default=None,
        description="the folder that all image paths start from, data.images of the training; null: images are not looked for",
    )
    missing_images: Literal["drop", "keep", "refuse"] = Field(
        default="drop", description="a record whose image is not there: left out and listed, kept, or the end of the build"
    )
    order: Literal["shuffled", "as_listed"] = Field(
        default="shuffled", description="the order of the records: drawn, or source after source"
    )
    tokenizer: FilePath | None = Field(
        default=None, description="tokenizer folder or file, to count tokens and to cut ShareGPT; null: tokens are not counted"
    )
    max_images: int = Field(
        default=1,
        ge=1,
        le=MOST_IMAGES,
        description="pictures a record may show, as data.max_images in training; records with more are bad",
    )
    max_bad_share: Share = Field(default=0.01, description="more bad annotations of a source than this share stop the build")


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class Mix(MixKeys):
    """A whole mix. `load_mix` makes one."""

    sources: tuple[SourceKeys, ...]


@cache
def whole_model() -> type[MixKeys]:
    """The config with every format's own keys, told apart by `format`."""
    kinds = dict.fromkeys(keys for keys, _ in FORMATS.values())
    one = Annotated[Union[tuple(kinds)], Field(discriminator="format")]  # type: ignore[valid-type]  # noqa: UP007
    many = Annotated[tuple[one, ...], BeforeValidator(_as_tuple), Field(min_length=1, description="what the mix is made of")]
    return create_model("Mix", __base__=MixKeys, __doc__="A mix of sources.", sources=(many, ...))


def load_mix(path: Path) -> Mix:
    """The checked config in the file at `path`. Raises UserError that lists every problem, each in a line that names the key."""
    try:
        given = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); give the path of a mix in YAML, such as mix665k.yaml"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not text in UTF-8; give the path of a mix in YAML") from None
    if not isinstance(given, dict):
        raise UserError(f"{path}: holds {in_yaml(given)}, not keys; a mix holds lines such as 'seed: 0', and sources")
    return check_mix(given)


def check_mix(given: dict[str, Any]) -> Mix:
    """A Mix from a plain mapping. Raises UserError like `load_mix`."""
    try:
        checked: Any = whole_model().model_validate(given)
    except ValidationError as error:
        raise UserError(_in_words(error.errors(), given)) from None
    names = [source.name for source in checked.sources]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"sources: the name {quoted(twice[0])} stands twice; give each source a name of its own")
    return Mix.model_construct(**{key: getattr(checked, key) for key in type(checked).model_fields})


def _in_words(problems: Sequence[Any], given: dict[str, Any]) -> str:
    """A line for each problem, that begins with the key as it stands in the file."""
    lines: list[str] = []
    for problem in problems:
        place, known = _place(problem["loc"], given)
        key = ".".join(map(str, place))
        match problem["type"]:
            case "missing":
                lines.append(f"{key}: is missing; write it there")
            case "extra_forbidden":
                lines.append(f"{key}: no such key{did_you_mean(key, known)}")
            case "union_tag_invalid" | "union_tag_not_found":
                lines.append(_format_problem(key, problem))
            case "too_short":
                lines.append(f"{key}: is empty; write at least one")
            case "string_pattern_mismatch":
                lines.append(f"{key}: {in_yaml(problem['input'])} is not of the form {problem['ctx']['pattern']}; write one that is")
            case "string_too_short":
                lines.append(f"{key}: is empty; write a name")
            case "model_attributes_type" | "model_type" if len(place) == 1 and key != "sources":
                lines.append(f"{key}: {in_yaml(problem['input'])} holds no keys; write name, format and files below it")
            case "tuple_type":
                lines.append(f"{key}: {in_yaml(problem['input'])} is no list; write one entry a line, each behind '- '")
            case _:
                lines.append(in_words([{**problem, "loc": place}], known))
    return "\n".join(dict.fromkeys(lines))


def _place(loc: Sequence[Any], given: dict[str, Any]) -> tuple[tuple[Any, ...], list[str]]:
    """Where a problem lies, in the file's terms, and the keys that there may be."""
    top = [key for key in whole_model().model_fields if key != "sources"]
    if len(loc) < 2 or loc[0] != "sources":
        return tuple(loc), [*top, "sources"]
    index, entry = loc[1], given["sources"][loc[1]]
    name = entry.get("name") if isinstance(entry, dict) else None
    begin = f"sources.{name if isinstance(name, str) and name else index}"
    if len(loc) > 2 and loc[2] in FORMATS:
        # The validator's word for the format is no key; nor is what it calls the kinds of a value.
        rest = tuple(part for part in loc[3:] if not (isinstance(part, str) and ("[" in part or part.startswith("function-"))))
        known = [f"{begin}.{key}" for key in _keys_of(FORMATS[loc[2]][0])]
        return (begin, *rest), known
    return (begin, *loc[2:]), []


def _format_problem(key: str, problem: Any) -> str:
    words = ", ".join(FORMATS)
    if problem["type"] == "union_tag_not_found":
        return f"{key}: says no format; write format: and one of {words}"
    given = str(problem["ctx"]["tag"])
    guess = did_you_mean(f"format.{given}", [f"format.{word}" for word in FORMATS]).replace("format.", "")
    return f"{key}.format: {quoted(given)} is not among the formats{guess}"


def _keys_of(model: type[Section], prefix: str = "") -> list[str]:
    """The dotted keys of a section and of those in it."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        keys.append(f"{prefix}{name}")
        if isinstance(inner, type) and issubclass(inner, Section):
            keys += _keys_of(inner, f"{prefix}{name}.")
    return keys
