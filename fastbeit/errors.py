"""Errors for the user: each has a message and an exit code that a scheduler understands."""

DONE = 0
USAGE = 2
DATA_LIMIT = 65
DATA_MISSING = 66
CANNOT_CREATE = 73
CANNOT_WRITE = 74
PREEMPTED = 75
CHECKPOINT_UNUSABLE = 78


class RunError(Exception):
    """What was wanted, what was found, what to do; the command prints it on one line and exits with `exit_code`."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ConfigError(RunError):
    """The configuration cannot be run."""

    def __init__(self, message: str) -> None:
        super().__init__(message, USAGE)


class DataError(RunError):
    """The data cannot be used: missing (exit code 66) or too much of it bad (65)."""

    def __init__(self, message: str, exit_code: int = DATA_MISSING) -> None:
        super().__init__(message, exit_code)


class WorkerError(RunError):
    """A process that reads and decodes for this one has died."""


class BadImage(Exception):
    """The bytes are not an image that can be used; the message is the reason, without the path."""


class TokenizerError(RunError):
    """The files of a tokenizer cannot be used: exit code 78."""

    def __init__(self, message: str) -> None:
        super().__init__(message, CHECKPOINT_UNUSABLE)


class WeightsError(RunError):
    """A model's weights cannot be used: damaged, of an unknown kind, or not all there (exit code 78)."""

    def __init__(self, message: str) -> None:
        super().__init__(message, CHECKPOINT_UNUSABLE)


class CacheError(RunError):
    """A cache of tokens cannot be used: damaged or not finished (exit code 78), or not there (66)."""

    def __init__(self, message: str, exit_code: int = CHECKPOINT_UNUSABLE) -> None:
        super().__init__(message, exit_code)
