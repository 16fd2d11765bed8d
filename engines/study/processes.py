"""Tasks side by side, each in a process of its own on its share of the processors or its own GPU.

Processes and not threads: training seeds torch's one global generator, and a process can be bound to what it may use. A signal
to this process reaches the others as SIGTERM; they commit and end. This module imports no torch, so that a process is bound
before torch counts what it finds.
"""

from __future__ import annotations

import math
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from engines import errors
from engines.errors import DiffRCError, EngineError, Interrupted
from engines.interrupt import catch_signals
from engines.progress import Report

TELL_SECONDS = 0.5  # between two messages of a process
GRACE_SECONDS = 60.0  # for a process to commit and end


@dataclass(frozen=True)
class Slot:
    """What one process may use: processors, and a GPU by its number; None = none."""

    processors: frozenset[int] = frozenset()
    gpu: int | None = None

    def claim(self) -> None:
        """Bind this process to the slot. Must come before torch is imported."""
        if self.gpu is not None:
            visible = [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
            os.environ["CUDA_VISIBLE_DEVICES"] = visible[self.gpu] if visible else str(self.gpu)
        if self.processors and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, self.processors)


@dataclass(frozen=True)
class Task:
    """A call that a process can make, with a `Report` as its last argument.

    The function is named, and its arguments need no torch to unpickle: a process unpickles them before it is bound.
    """

    name: str
    module: str
    function: str
    arguments: tuple[Any, ...]
    weight: float = 1.0  # of its work beside that of other tasks


def slots(gpus: int, workers: int) -> list[Slot]:
    """`workers` slots: a GPU each where there are any, else equal shares of the processors."""
    if gpus:
        return [Slot(gpu=i) for i in range(min(gpus, workers))]
    everything = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    count = min(workers, len(everything) or workers)
    return [Slot(frozenset(everything[i::count])) for i in range(count)]


def run_tasks(tasks: Sequence[Task], places: Sequence[Slot], report: Report, start_another: Callable[[], bool] = lambda: True) -> list[Any]:
    """Results of the tasks in order, None for those that were not started.

    Args:
        places: as many tasks at a time.
        report: hears "study" in thousandths of a task of average weight, with the number of those that are done.
        start_another: asked before each task; once it says no, the rest is left.

    Raises: Interrupted by a signal; what a task raised, when the others have committed and ended; EngineError for a process that died.
    """
    waiting, free = deque(range(len(tasks))), deque(places)
    running: dict[Connection, tuple[int, Slot, SpawnProcess]] = {}
    results: list[Any] = [None] * len(tasks)
    shares = [0.0] * len(tasks)
    failure: DiffRCError | None = None
    kill_at = math.inf
    with catch_signals() as stop:
        try:
            while running or (waiting and not failure and not stop.requested):
                while waiting and free and not failure and not stop.requested:
                    if not start_another():
                        waiting.clear()
                        break
                    connection, process = _start(tasks[waiting[0]], free[0])
                    running[connection] = (waiting.popleft(), free.popleft(), process)
                for ready in wait(list(running), timeout=TELL_SECONDS):
                    assert isinstance(ready, Connection)
                    i, slot, process = running[ready]
                    kind, value = _message(ready, tasks[i], process)
                    if kind == "share":
                        shares[i] = value
                        continue
                    process.join()
                    del running[ready]
                    free.append(slot)
                    if kind == "done":
                        results[i], shares[i] = value, 1.0
                    elif not isinstance(value, Interrupted):
                        failure = failure or value
                if (failure or stop.requested) and kill_at == math.inf:
                    kill_at = time.monotonic() + GRACE_SECONDS
                    for _, _, process in running.values():
                        process.terminate()
                if time.monotonic() > kill_at:
                    break
                finished = sum(result is not None for result in results)
                done = sum(share * task.weight for share, task in zip(shares, tasks, strict=True)) / sum(task.weight for task in tasks)
                report("study", round(1000 * len(tasks) * done), 1000 * len(tasks), {"finished": float(finished)})
        finally:  # at a second signal, or after the grace: what has not committed by now does not
            for _, _, process in running.values():
                process.kill()
        if failure:
            raise failure
        if stop.requested:
            raise stop.error(f"{sum(result is not None for result in results)} of {len(tasks)} parts of this step are finished")
    return results


def _start(task: Task, slot: Slot) -> tuple[Connection, SpawnProcess]:
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, slot, task), name=task.name, daemon=True)
    process.start()
    theirs.close()
    return ours, process


def _message(connection: Connection, task: Task, process: SpawnProcess) -> tuple[str, Any]:
    """("share", 0..1), ("done", result) or ("failed", error); a process that ends without a word has failed."""
    try:
        kind, value = connection.recv()
    except EOFError:
        process.join()
        problem = f"the process of {task.name} ended with code {process.exitcode} and no word (too little memory?)"
        return "failed", EngineError(problem, "the same command continues; --workers 1 needs the least memory")
    return kind, _error(*value) if kind == "failed" else value


def _error(name: str, problem: str, remedy: str, number: int) -> DiffRCError:
    kind = getattr(errors, name)
    error: DiffRCError = kind(problem, remedy, number) if kind is Interrupted else kind(problem, remedy)
    return error


def _work(connection: Connection, slot: Slot, task: Task) -> None:
    """What a process does: bind itself, call, and say how it ended. Ctrl-C goes to the terminal's own group, and not to this one."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    slot.claim()
    told = 0.0

    def hear(what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        nonlocal told
        if what == "share" and time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            connection.send(("share", done / max(total, 1)))  # fails, and so ends this process, where nobody listens any more

    try:
        call = getattr(import_module(task.module), task.function)
        connection.send(("done", call(*task.arguments, hear)))
    except DiffRCError as error:
        number = error.signal_number if isinstance(error, Interrupted) else 0
        connection.send(("failed", (type(error).__name__, error.problem, error.remedy, number)))
    except BrokenPipeError:
        return
    except Exception as error:
        traceback.print_exc()
        connection.send(("failed", ("DiffRCError", f"internal error in {task.name}: {errors.first_line(error)}", "please report it", 0)))
