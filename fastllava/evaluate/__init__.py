"""Answers of a trained model to questions about images, and how good they are: what `fastllava answer`, `score`, `eval` and `report` do."""
