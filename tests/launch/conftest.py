"""The small world of tests/training."""

from small_world import settings, world  # noqa: F401 (fixtures)
