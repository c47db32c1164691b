"""The error that a user can mend: it names the option, the bad value and the remedy."""


class InvalidInput(ValueError):
    """Input that cannot be used; the message alone, without a traceback, is enough to mend it."""


class SharedInvalidInput(InvalidInput):
    """The same, raised on all ranks together: each may leave in its own time, none waits for another."""


class SharedFailure(RuntimeError):
    """What went wrong while a run was under way, raised on all ranks together with one message."""


class StallError(RuntimeError):
    """A rank has not been heard of for too long; the message names it."""


class StageError(RuntimeError):
    """Something failed in a stage of a pipeline; the message names the stage, the cause is the error itself."""
