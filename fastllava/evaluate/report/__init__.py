"""The HTML pages: what a run did, and what a checkpoint scores. Each is one file that needs no network."""
