"""Signals: the first asks a long job to finish its batch and commit, the second ends it at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from engines.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Set by the first signal; a job asks after each batch that it has committed."""

    def __init__(self) -> None:
        self.signal_number = 0

    @property
    def requested(self) -> bool:
        return self.signal_number != 0

    def error(self, what: str) -> Interrupted:
        """The typed end of a job that stopped after committing; `what` says how far it came."""
        name = signal.Signals(self.signal_number).name
        return Interrupted(f"stopped by {name}: {what}", "the same command continues from there", self.signal_number)


@contextlib.contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM and SIGUSR1 into a request while the block runs; nested blocks and other threads share nothing."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may install handlers
        yield stop
        return

    def handler(number: int, _frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.signal_number = number

    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)
