"""Questions and the file that the original keeps them in: those of `fastllava.data.questions`, which training reads too."""

from fastllava.data.questions import Question, StoredImage, image_bytes, json_file, json_lines, read_questions

__all__ = ["Question", "StoredImage", "image_bytes", "json_file", "json_lines", "read_questions"]
