"""What an evaluation may be refused for."""


class EvaluationError(ValueError):
    """What cannot be evaluated. The message is one line that says what to do about it."""
