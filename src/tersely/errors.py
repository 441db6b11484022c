"""What can go wrong in a way that the user can mend. Each class has the exit code of the command line.

Every message says what was found, what was expected and what to do.
"""


class TerselyError(Exception):
    """Any error that is the user's to mend; `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(TerselyError):
    """An argument, a recipe, a pattern or a setting that cannot be taken."""

    exit_code = 2


class CheckpointError(TerselyError):
    """A source that cannot be read or must not be trusted: missing, corrupt, unknown, unsafe."""

    exit_code = 3


class DataError(TerselyError):
    """A text that cannot serve: missing, empty, too short."""

    exit_code = 4


class OutputError(TerselyError):
    """A place that cannot be written: it exists, is read-only, is full, or holds another job."""

    exit_code = 5


class ResourceError(TerselyError):
    """A job that cannot fit into the memory or the disk at hand."""

    exit_code = 6


class VerificationError(TerselyError):
    """A finished folder that is not what its manifest says, or does not run."""

    exit_code = 7


def first_line(error: Exception) -> str:
    """What another library's error says, short enough to stand in a message: its type and its first line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
