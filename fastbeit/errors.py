"""How a run ends other than well: a message for its user and an exit code that a scheduler understands."""

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
