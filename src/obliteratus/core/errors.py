"""Define the errors that a user can mend. Every other exception is a bug and shows its traceback."""


class UserError(Exception):
    """An error that the user can mend. The message says what is wrong, where, and what to do.

    The command line prints it in one line and exits with 2. Nothing has been written by then.
    """


class NothingMatchedError(UserError):
    """A requested edit matches no weight. Applying only a part of what was requested is an error."""


class UnsupportedModelError(UserError):
    """The architecture, or the way its weights are stored, is not supported."""
