"""The exceptions that are no fault of the program's: the user can mend this, or wants it."""


class UserError(Exception):
    """A mistake the user can mend: shown as one line on standard error, exit status 2, no traceback.

    The message names what is wrong and what to do; `--debug=True` shows the traceback as well.
    """


class Stopped(Exception):
    """A run that ended early because it was told to, in good order; its text is for the terminal. status: the exit status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status
