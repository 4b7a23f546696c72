"""The error this package raises."""


class CheckpointError(ValueError):
    """A model or checkpoint that cannot be used. The message is one line: which one, and what to do about it."""
