"""The one way to fail: what is wrong, what to type, and a documented exit code."""

from __future__ import annotations

from typing import ClassVar


class DiffRCError(Exception):
    """A failure that the user can mend.

    Args:
        problem: one line of cause, without a final traceback or class name.
        remedy: one line that says what to type or change.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy


class UsageError(DiffRCError):
    """A wrong option, recipe key, value or class name."""

    exit_code = 2


class DataError(DiffRCError):
    """A missing, unreadable or unusable data set, image, list, archive or checkpoint file."""

    exit_code = 3


class EngineError(DiffRCError):
    """A runtime, provider or device that was asked for and cannot run here, or an engine that is missing or stale."""

    exit_code = 4


class ConflictError(DiffRCError):
    """A run folder in use by another process, or one that holds another recipe or plan."""

    exit_code = 5


class ParityError(DiffRCError):
    """An engine whose numbers disagree with torch, or an image that cannot be remade."""

    exit_code = 6


class NumericsError(DiffRCError):
    """Losses, weights or images that are no longer finite."""

    exit_code = 7


class StorageError(DiffRCError):
    """A folder that cannot be written, a full disk, or a write that failed."""

    exit_code = 8


class YieldError(DiffRCError):
    """Fewer images than were asked for, since the selection dropped too many; what it kept is in place and can be used."""

    exit_code = 9


class Interrupted(DiffRCError):
    """Stopped by a signal after the current batch was committed; the same command continues."""

    exit_code = 130

    def __init__(self, problem: str, remedy: str, signal_number: int = 2) -> None:
        super().__init__(problem, remedy)
        self.signal_number = signal_number


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, for the problem of one of ours; its class where none does."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
