"""The one exception for a user's mistake: its message is one line that names the key or record, what was given and the remedy."""


class UserError(Exception):
    """Something the user can mend. The command line prints its message without a traceback and exits with 2."""
