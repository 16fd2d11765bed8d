"""Processes side by side: bound to their share, heard in order, ended together, and none of them torch's before it is bound."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from engines.errors import DataError, DiffRCError, EngineError, Interrupted
from engines.progress import silent
from engines.study.processes import Slot, Task, run_tasks, slots

JOBS = """
import os, signal, sys, time
from pathlib import Path
from engines.errors import DataError
from engines.interrupt import catch_signals

def square(x, report):
    report("share", 1, 2, {})
    return x * x

def processors(report):
    return sorted(os.sched_getaffinity(0)), "torch" in sys.modules, os.environ.get("CUDA_VISIBLE_DEVICES")

def refuse(report):
    raise DataError("no such image", "look again")

def stumble(report):
    return 1 / 0

def die(report):
    os.kill(os.getpid(), signal.SIGKILL)

def work(folder, report):
    with catch_signals() as stop:
        Path(folder, f"began-{os.getpid()}").touch()
        while not stop.requested:
            time.sleep(0.02)
        Path(folder, f"committed-{os.getpid()}").touch()
        raise stop.error("all of it is kept")
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "jobs_of_a_test.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return "jobs_of_a_test"


TWO = (Slot(), Slot())


def test_results_come_in_the_order_of_the_tasks_and_progress_ends_at_all(jobs: str) -> None:
    heard: list[tuple[int, int]] = []
    tasks = [Task(f"square {x}", jobs, "square", (x,), weight=float(x)) for x in (3, 4, 5)]
    assert run_tasks(tasks, TWO, lambda what, done, total, figures: heard.append((done, total))) == [9, 16, 25]
    assert heard[-1] == (3000, 3000)
    assert heard == sorted(heard)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system binds no process to processors")
def test_a_process_is_bound_before_torch_counts_what_it_finds(jobs: str) -> None:
    (one,) = run_tasks([Task("bound", jobs, "processors", ())], slots(0, 1), silent)
    assert one == (sorted(os.sched_getaffinity(0)), False, None)
    first = min(os.sched_getaffinity(0))
    (one,) = run_tasks([Task("bound", jobs, "processors", ())], (Slot(frozenset({first}), gpu=1),), silent)
    assert one == ([first], False, "1")


def test_processors_are_shared_out_evenly_and_every_gpu_has_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)), raising=False)
    assert [sorted(slot.processors) for slot in slots(0, 2)] == [[0, 2, 4], [1, 3]]
    assert len(slots(0, 9)) == 5
    assert slots(4, 3) == [Slot(gpu=0), Slot(gpu=1), Slot(gpu=2)]


def test_a_gpu_is_counted_among_those_that_this_process_may_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    Slot(gpu=1).claim()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"


def test_a_failure_is_raised_as_what_it_was_when_the_others_have_committed(jobs: str, tmp_path: Path) -> None:
    tasks = [Task("work", jobs, "work", (str(tmp_path),)), Task("refuse", jobs, "refuse", ())]
    with pytest.raises(DataError, match="no such image") as failure:
        run_tasks(tasks, TWO, silent)
    assert failure.value.remedy == "look again"
    assert len(list(tmp_path.glob("began-*"))) == len(list(tmp_path.glob("committed-*")))


def test_a_mistake_of_ours_names_the_task_and_a_dead_process_is_told(jobs: str) -> None:
    with pytest.raises(DiffRCError, match="internal error in stumble: division by zero"):
        run_tasks([Task("stumble", jobs, "stumble", ())], TWO, silent)
    with pytest.raises(EngineError, match="the process of die ended with code -9"):
        run_tasks([Task("die", jobs, "die", ())], TWO, silent)


def test_tasks_that_may_not_start_are_left(jobs: str) -> None:
    answers = iter((True, False))
    tasks = [Task(f"square {x}", jobs, "square", (x,), weight=float(x)) for x in (3, 4, 5)]
    assert run_tasks(tasks, TWO[:1], silent, lambda: next(answers)) == [9, None, None]


def test_a_signal_lets_every_process_commit(jobs: str, tmp_path: Path) -> None:
    def signal_once_both_work() -> None:
        while len(list(tmp_path.glob("began-*"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=signal_once_both_work)
    sender.start()
    with pytest.raises(Interrupted, match="stopped by SIGTERM: 0 of 3 parts") as stop:
        run_tasks([Task("work", jobs, "work", (str(tmp_path),))] * 3, TWO, silent)
    sender.join()
    assert stop.value.signal_number == signal.SIGTERM
    assert len(list(tmp_path.glob("committed-*"))) == 2
