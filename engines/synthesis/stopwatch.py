"""How a job tells the seconds of the networks from all other seconds of its workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Stopwatch:
    """Seconds spent in what it was told to time, for one thread."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[P, R]) -> Callable[P, R]:
        """The same function; its calls count. On a GPU a call is done when its work is queued, and who waits for it is counted."""

        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return wrapper


class Spent(NamedTuple):
    """Wall-clock seconds of a job, summed over its threads: those that draw, while they work or wait for work, and the one that writes."""

    network: float = 0.0  # in the network and the guide
    worker: float = 0.0  # in all, the network's among them

    def __add__(self, other: object) -> Spent:
        """Both together."""
        assert isinstance(other, Spent)
        return Spent(self.network + other.network, self.worker + other.worker)

    @property
    def outside_network(self) -> float | None:
        """The share that went into noise, updates, PNG and manifest; None where nothing was drawn."""
        return 1 - self.network / self.worker if self.network else None
