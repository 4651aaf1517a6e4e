"""Errors that a user can mend."""


class ModelError(ValueError):
    """A model's configuration, weights or input is wrong; the message is one sentence that says how to mend it."""
