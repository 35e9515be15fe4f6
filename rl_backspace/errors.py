"""The one exception that means "the user can mend this", and how mistakes are worded."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: says what came, what was expected and what to do, one line per problem.

    The command line prints it without a traceback and exits with code 2.
    """


def nearest(name: object, known: Iterable[object]) -> str:
    """`; did you mean 'x'?`, or nothing when no known name is near."""
    close = difflib.get_close_matches(str(name), map(str, known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of what other code's exception says; its name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """An exception's name and all that it says, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")


def words(error: BaseException) -> str:
    """What the command line says of an exception: a `UserError`'s own lines, another one's name and words on one."""
    return str(error) if isinstance(error, UserError) else one_line(error)
