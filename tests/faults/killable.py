"""A process that runs `diffrc` in a child of its own again and again, and has it fail where it is told to.

One request a line of stdin, one exit status a line of stdout; what commands import is imported once, before the first fork, so that
a command costs its work alone. A request is JSON: {"words": [...], "cwd": "...", "fault": null or a fault}. A fault has

    where   "line"    before (count 0) or after (count 1) a line of metrics is written
            "write"   at the count-th fsync: in a checkpoint's files, its manifest, its folder, an image, the next line
            "moment"  count milliseconds later, wherever the command is then
    stage, step       it counts from the metrics line of that step on, or of a later one of the stage; without them, from the start
    error   the number of an error that the write ends with; without it SIGKILL: nothing is flushed, no handler runs, no lock is
            given back by hand

The answer to a request is {"code": exit status, "writes": fsyncs of the child, or -1 where it was killed}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sklearn.datasets
import torch
import torch._dynamo  # which the optimizers import when they are made

from diffrc_cli import evaluate, export, report, synth, train
from diffrc_cli.app import main
from engines import store
from engines.evaluation import judge
from engines.synthesis import synthesize
from engines.training import stages

BEFORE_THE_FORK = (sklearn.datasets, torch._dynamo, train, export, synth, evaluate, report, stages, synthesize, judge)

append_json, fsync = store.append_json, os.fsync
writes = 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal comes to the process before this thread goes on


def watched_fsync(descriptor: int) -> None:
    global writes
    writes += 1
    fsync(descriptor)


def arm(fault: Mapping[str, Any]) -> None:
    """Have this process fail as told."""
    count, where, armed = int(fault["count"]), fault["where"], threading.Event()

    def begin() -> None:
        armed.set()
        if where == "moment":
            threading.Timer(count / 1000, die).start()

    def append_and_count(path: Path, value: Mapping[str, Any]) -> None:
        here = path.parent.name == fault["stage"] and value.get("step", -1) >= fault["step"] and not armed.is_set()
        if here and where == "line" and not count:
            die()
        if here and where == "write":
            begin()
        append_json(path, value)
        if here and where == "line":
            die()
        if here and where == "moment":
            begin()

    def fsync_or_fail(descriptor: int) -> None:
        nonlocal count
        if armed.is_set() and where == "write":
            count -= 1
            if count < 0 and "error" not in fault:
                die()
            if count == -1:
                raise OSError(fault["error"], os.strerror(fault["error"]))
        watched_fsync(descriptor)

    os.fsync = fsync_or_fail
    if "stage" in fault:
        store.append_json = append_and_count
    else:
        begin()


def child(request: Mapping[str, Any]) -> int:
    os.chdir(request["cwd"])
    sys.stdout = sys.stderr  # stdout is the answer's
    os.fsync = watched_fsync
    if request["fault"]:
        arm(request["fault"])
    try:
        main(request["words"])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def run(request: Mapping[str, Any]) -> dict[str, int]:
    """In a child; how often it flushed comes back through a pipe, if it lives to say so."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        os.close(reading)
        code = child(request)
        os.write(writing, str(writes).encode())
        sys.stderr.flush()
        os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    return {"code": os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), "writes": int(told or -1)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
