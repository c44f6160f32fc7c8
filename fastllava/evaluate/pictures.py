"""The pictures that questions are about, as the model sees them; one that cannot be seen is named with its question."""

from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastllava.config.keys import DataConfig
from fastllava.data.checks import BadRecord
from fastllava.data.images import pixels_of, read_image
from fastllava.errors import UserError
from fastllava.evaluate.checkpoint import Trained
from fastllava.evaluate.questions import Question, StoredImage

Image = Path | StoredImage | bytes


class BadQuestion(UserError):
    """A question that cannot be asked, as when its picture is missing or damaged. `reason` says what is the matter with it."""

    def __init__(self, question: Question, reason: str) -> None:
        super().__init__(f"question {question.id}: {reason}")
        self.question, self.reason = question, reason

    def __reduce__(self) -> tuple[type["BadQuestion"], tuple[Question, str]]:
        return BadQuestion, (self.question, self.reason)


def load_pictures(question: Question, trained: Trained) -> tuple[NDArray[np.uint8], ...]:
    """`load_picture` of each of the question's pictures."""
    return tuple(load_picture(question, image, trained) for image in question.images)


def load_picture(question: Question, image: Image, trained: Trained) -> NDArray[np.uint8]:
    """uint8 [3, size, size] of a picture of the question as `trained` was shown pictures. Raises BadQuestion."""
    limits = _limits()
    where = f"image {image}" if isinstance(image, Path) else "its image"
    try:
        if isinstance(image, Path):
            data = read_image(image, limits)
        else:
            data = image if isinstance(image, bytes) else image.read()
        return pixels_of(data, trained.image_policy, trained.model.spec, limits)
    except BadRecord as problem:
        raise BadQuestion(question, f"{where}: {problem.detail}") from None
    except ValueError:
        raise BadQuestion(question, f"image {str(image)!r} is no path; write one below the folder of images") from None


def missing_picture(question: Question) -> Path | None:
    """The first file of the question's pictures that does not exist, of those that are files by themselves."""
    return next((image for image in question.images if isinstance(image, Path) and not image.is_file()), None)


@lru_cache(1)
def _limits() -> DataConfig:
    """What keeps a file from filling the memory; narrow and small pictures, which training sets aside, are asked about."""
    given = {"records": Path(), "image_policy": "pad", "template": "v1", "group_by_modality": False}
    return DataConfig.model_validate({**given, "min_image_side": 1, "max_image_aspect": 1000.0})
