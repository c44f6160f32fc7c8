"""What a run records of itself: the figures of each step, its backends and its summary."""
