"""The ops of fastllava, one folder ("room") each; `rooms()` finds them. Depends on torch and triton only.

Importing it, and asking a room for its name, summary or the names of its implementations, imports neither of the two.
"""

from fastllava_kernels.room import REFERENCE, Implementation, Room, Sizes, choose, rooms

__all__ = ["REFERENCE", "Implementation", "Room", "Sizes", "choose", "rooms"]
