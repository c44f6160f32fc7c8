"""What a run will need and take on GPUs that are not here: memory by kind, time, and what limits it."""
