"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake the user can mend: shown as one line on standard error, exit status 2, no traceback.

    The message names what is wrong and what to do; `--debug=True` shows the traceback as well.
    """
