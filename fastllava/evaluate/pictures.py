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
from fastllava.evaluate.questions import Question


class BadQuestion(UserError):
    """A question that cannot be asked, as when its picture is missing or damaged. `reason` says what is the matter with it."""

    def __init__(self, question: Question, reason: str) -> None:
        super().__init__(f"question {question.id}: {reason}")
        self.question, self.reason = question, reason

    def __reduce__(self) -> tuple[type["BadQuestion"], tuple[Question, str]]:
        return BadQuestion, (self.question, self.reason)


def load_picture(question: Question, trained: Trained) -> NDArray[np.uint8] | None:
    """uint8 [3, size, size] of the question's picture as `trained` was shown pictures; None without one. Raises BadQuestion."""
    image, limits = question.image, _limits()
    if image is None:
        return None
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


def is_there(question: Question) -> bool:
    """Whether the file of the question's picture exists, as far as it is one by itself."""
    return not isinstance(question.image, Path) or question.image.is_file()


@lru_cache(1)
def _limits() -> DataConfig:
    """What keeps a file from filling the memory; narrow and small pictures, which training sets aside, are asked about."""
    given = {"records": Path(), "image_policy": "pad", "template": "v1", "group_by_modality": False}
    return DataConfig.model_validate({**given, "min_image_side": 1, "max_image_aspect": 1000.0})
