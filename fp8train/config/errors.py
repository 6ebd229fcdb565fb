"""Errors that are the user's to fix.

Everything a person can cause (a typo in a file, a missing dataset, a full disk) is raised as a
:class:`UserError`. The command line prints its message, one to five lines that say what is wrong and what to
do, and exits with ``exit_status``; no traceback. Anything else that escapes is a bug of ours and keeps its
traceback.
"""


class UserError(Exception):
    """Something the user can fix. The message says what is wrong, where, and what to do, in at most five
    lines."""

    exit_status: int = 2


class ConfigError(UserError):
    """A configuration file or override is wrong. The message starts with ``file:line: key:`` where they are
    known."""
