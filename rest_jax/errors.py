"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """The user's configuration or data is at fault: the command prints the message and exits with 2.

    The message names the field, what was given, what is legal and how to fix it.
    """


class Preempted(Exception):
    """SIGTERM arrived and everything is saved: the command exits with 42, and the same command continues the run."""
