"""A process that runs `diffrc train` in a child of its own again and again, and has it killed where it is told to.

One request a line of stdin, one exit status a line of stdout; what training imports is imported once, before the first fork, so that
a run costs its training alone. A request is JSON: {"words": [...], "cwd": "...", "kill": null or {"stage", "step", "where", "count"}}.
From the metrics line of that step on, or of a later one of the stage,

    where = "line"    the child dies before (count 0) or after (count 1) the line is written
    where = "write"   it dies at its count-th fsync: in a checkpoint's files, its manifest, its folder, a grid, the next line
    where = "moment"  it dies count milliseconds later, wherever it is then

SIGKILL each time: nothing is flushed, no handler runs, no lock is given back by hand.
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

from diffrc_cli import train
from diffrc_cli.app import main
from engines import store
from engines.training import stages

BEFORE_THE_FORK = (sklearn.datasets, torch._dynamo, train, stages)

append_json, fsync = store.append_json, os.fsync


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal comes to the process before this thread goes on


def arm(kill: Mapping[str, Any]) -> None:
    """Have this process killed as told."""
    count, armed = int(kill["count"]), threading.Event()

    def watched_append(path: Path, value: Mapping[str, Any]) -> None:
        here = path.parent.name == kill["stage"] and value.get("step", -1) >= kill["step"] and not armed.is_set()
        if here and kill["where"] == "line" and not count:
            die()
        if here:
            armed.set()
        append_json(path, value)
        if here and kill["where"] == "line":
            die()
        if here and kill["where"] == "moment":
            threading.Timer(count / 1000, die).start()

    def watched_fsync(descriptor: int) -> None:
        nonlocal count
        if armed.is_set() and kill["where"] == "write":
            if not count:
                die()
            count -= 1
        fsync(descriptor)

    store.append_json, os.fsync = watched_append, watched_fsync


def child(request: Mapping[str, Any]) -> int:
    os.chdir(request["cwd"])
    sys.stdout = sys.stderr  # stdout is the answer's
    if request["kill"]:
        arm(request["kill"])
    try:
        main(request["words"])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        process = os.fork()
        if not process:
            os._exit(child(json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
