"""The one exception for a user's mistake: its message is one line that names the key or record, what was given and the remedy."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


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


def or_download(folder: Path) -> str:
    """End a message about a missing model folder with the command that downloads it, where the path may be a name on the hub."""
    name = folder.as_posix()
    return f", or download it: hf download {name} --local-dir {name}" if _HUB_NAME.fullmatch(name) else ""
