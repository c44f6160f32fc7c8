"""The ops of fastllava, one folder ("room") each; `rooms()` finds them. Depends on torch and triton only."""

from fastllava_kernels.room import Implementation, Room, choose, rooms

__all__ = ["Implementation", "Room", "choose", "rooms"]
