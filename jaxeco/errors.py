"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something the user can mend.

    The message is one line: what is wrong, what was expected, what to do. `jaxeco.run` prints it
    without a traceback and exits with status 2; anything else that is raised is a bug of ours and
    keeps its traceback.
    """

    status = 2


class RunFailed(UserError):
    """A run that was well described but could not be carried through."""

    status = 1


class Hung(RunFailed):
    """A thread of a library will not end, and must not keep the process from its own end."""
