"""Questions, and the file that the original keeps them in: one JSON object a line (llava/eval/model_vqa_loader.py)."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastllava.errors import UserError

Json = TypeVar("Json", dict[str, Any], list[Any])


class StoredImage(Protocol):
    """An image file inside another file, as MMBench's tables have them: read when it is needed, as all of them are too much to hold."""

    def read(self) -> bytes:
        """The bytes of the image file. Raises UserError."""
        ...


@dataclass(frozen=True)
class Question:
    """A question as a model is asked it, and what the answers file says of it."""

    id: int | str
    """Its `question_id`. TextVQA and MME have several questions under one."""
    text: str
    """What the prompt holds after the image's line."""
    image: Path | StoredImage | bytes | tuple[Path, ...] | None
    """An image file, or the bytes of one (image_bytes gives them); None for a question without a picture. Of several their files."""
    prompt: str
    """The field `prompt` of its line in the answers file."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of its line in the answers file, as MMBench has them."""

    @property
    def images(self) -> "tuple[Path | StoredImage | bytes, ...]":
        """Its pictures in order."""
        if isinstance(self.image, tuple):
            return self.image
        return () if self.image is None else (self.image,)


def image_bytes(question: Question) -> bytes | None:
    """The bytes of a question's first image file, wherever it lies. Raises UserError that names the question when it cannot be read."""
    image = next(iter(question.images), None)
    if image is None or isinstance(image, bytes):
        return image
    try:
        return image.read_bytes() if isinstance(image, Path) else image.read()
    except OSError as error:
        raise UserError(f"question {question.id}: the image {image} cannot be read ({error.strerror}); put the file there") from None


def read_questions(path: Path, images: Path | None) -> list[Question]:
    """The questions of a file in the original's format, in its order, with their images below the folder `images`.

    A line is a JSON object of `question_id`, `text` and, for a question about a picture, `image`, a list for several. Raises UserError
    that names the line and what it lacks.
    """
    questions = []
    for number, row in json_lines(path):
        where = f"{path}: line {number}"
        if (missing := [key for key in ("question_id", "text") if key not in row]) or not isinstance(row["text"], str):
            raise UserError(
                f"{where} has no {' and no '.join(missing) or 'text that is a string'}; write question_id, image and text in every line"
            )
        if type(row["question_id"]) not in (int, str):
            raise UserError(f"{where}: question_id is {type(row['question_id']).__name__}; write a number or a string")
        named = listed_images(row.get("image"))
        if named is None:
            raise UserError(f"{where}: image is {type(row['image']).__name__}; write one path below the folder of images, or a list")
        if named and images is None:
            raise UserError(f"{where} names the image {named[0]}; give the folder that it lies in")
        if (wrong := wrong_places(row["text"], len(named))) is not None:
            raise UserError(f"{where}: {wrong}")
        files = tuple(images / one for one in named if images is not None)
        questions.append(Question(row["question_id"], row["text"], files if len(files) > 1 else next(iter(files), None), row["text"]))
    return questions


def listed_images(value: Any) -> tuple[str, ...] | None:
    """The paths that a question's `image` holds: a text, a list of texts, or nothing; None where it is something else."""
    paths: list[Any] = [] if value is None else value if isinstance(value, list) and value else [value]
    return tuple(paths) if all(isinstance(path, str) for path in paths) else None


def wrong_places(text: str, images: int) -> str | None:
    """What is wrong with the <image> in a question about so many pictures, or None.

    Several have a place each, or none is placed: then they stand before the question. One always does.
    """
    spelled = text.count("<image>")
    if images < 2 or spelled in (0, images):
        return None
    return f"the text has {spelled} <image> for {images} images; write one for each, where it belongs, or none, for all to stand before it"


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of `path`, one a line, each with its line number from 1; empty lines are passed over. Raises UserError.

    One after the other, so that a file of 450,000 questions is never in memory as a whole.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _json_object(path, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({_why(error)}); give a file of JSON lines") from None


def json_file(path: Path, kind: type[Json]) -> Json:
    """What the JSON file `path` holds: an object where `kind` is dict, an array where it is list. Raises UserError."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({_why(error)}); give a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}); download it again") from None
    if not isinstance(value, kind):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not a {kind.__name__}; give the benchmark's own file")
    return value


def _json_object(path: Path, number: int, line: str) -> dict[str, Any]:
    """The JSON object in `line`. Raises UserError."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: line {number} is no JSON; write one JSON object a line") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}: line {number} is a JSON {type(row).__name__}; write one JSON object a line")
    return row


def _why(error: OSError | UnicodeDecodeError) -> str:
    """Why a file cannot be read."""
    return str(error.strerror) if isinstance(error, OSError) else f"it is no UTF-8: {error.reason}"
