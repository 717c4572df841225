"""The one error a user can act on. Everything else is a bug and keeps its traceback."""


class ArraError(Exception):
    """Something the user can fix, told in one line: what is wrong, where, what was expected, what to do.

    The command line prints the line and leaves with exit code 2.
    """


class FirstProcessError(ArraError):
    """What the first of several processes found, on the others: it tells it, they only leave."""
