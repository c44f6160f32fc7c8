"""The state of a training on disk: checkpoints, and what a resume looks at."""
