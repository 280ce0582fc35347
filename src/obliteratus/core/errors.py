"""Define the errors that a user can mend. Every other exception is a bug and shows its traceback."""

import difflib
import re
from collections.abc import Iterable

# Ends of lines, and what else a terminal does not show as a character.
UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class UserError(Exception):
    """An error that the user can mend. The message says what is wrong, where, and what to do.

    The command line prints it in one line and exits with 2. Nothing has been written by then. Line feeds and the like
    in what a message quotes are shown as escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(UNSHOWN.sub(lambda found: repr(found[0])[1:-1], message))


class NothingMatchedError(UserError):
    """A requested edit matches no weight. Applying only a part of what was requested is an error."""


class NothingToFitError(UserError):
    """No answer shows how the model would answer without the behavior."""


class UnsupportedModelError(UserError):
    """The architecture, or the way its weights are stored, is not supported."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """Return one line that says that a name does not exist, with the closest known name or all of them."""
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean '{near[0]}'?" if near else "known: " + ", ".join(sorted(known))
    return f"{what} '{name}' does not exist; {hint}"
