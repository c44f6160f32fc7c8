"""The embedded default: a visual question-answering set that is drawn, not downloaded, and both stages trained on it."""
