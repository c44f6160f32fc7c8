"""The one exception for a user's mistake: its message is one line that names the key or record, what was given and the remedy."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can mend. The command line prints its message without a traceback and exits with 2."""


class ToldElsewhere(UserError):
    """A UserError that another process of the run tells the user."""


class PeerLost(ToldElsewhere):
    """Another process of the run has ended, so nothing can be done together any more; torchrun or that process says why."""


class DiskElsewhere(OSError):
    """An OSError that another process of the run has met, and tells the user where that is needed."""


@contextmanager
def first_of_machine_speaks() -> Iterator[None]:
    """For what every process does alike before they are connected: one of each machine tells a UserError, the others do not."""
    try:
        yield
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise ToldElsewhere(str(error)) from None
        raise
