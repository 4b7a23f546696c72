"""The errors this package raises."""


class CheckpointError(ValueError):
    """A model or checkpoint that cannot be used. The message is one line: which one, and what to do about it."""


class CheckpointUnreachable(CheckpointError):
    """A model that may well be right, but cannot be fetched from here and now."""
