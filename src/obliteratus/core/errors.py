"""Two kinds of error: the user's, shown in one line, and ours, shown with a traceback."""


class UserError(Exception):
    """Something that the user can mend. The message says what is wrong, where, and what to do.

    The command line prints it in one line and exits with 2; nothing has been written by then.
    """


class NothingMatchedError(UserError):
    """An edit was asked for and no weight answers to it: a partial application is an error."""


class UnsupportedModelError(UserError):
    """The architecture, or the way in which its weights are stored, is not in our tables."""
