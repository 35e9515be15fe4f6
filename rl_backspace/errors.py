"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """Bad input: says what came, what was expected and what to do, in one line.

    The command line prints it without a traceback and exits with code 2.
    """
