"""The one exception that means "the input is at fault, not the program"."""


class InputError(ValueError):
    """Bad user input: a file, an option or a value that the user can mend.

    The message is one sentence that names the file (and the row, where there is one), what is wrong with it and what
    to do about it. Command lines print the message alone; see `blt_data.console.friendly_errors`.
    """


class SetupError(InputError):
    """Something is wrong with the command, the environment or the right to read, not with some rows or files.

    No policy about bad input lets it pass: what follows would fail in the same way.
    """
