"""A process that runs `diffrc` in a child of its own again and again, and has it fail where it is told to.

One request a line of stdin, one exit status a line of stdout; what commands import is imported once, before the first fork, so that
a command costs its work alone. A request is JSON: {"words": [...], "cwd": "...", "fault": null or a fault}. A fault has

    where   "line"    before (count 0) or after (count 1) a line of metrics is written
            "write"   at the count-th fsync: in a checkpoint's files, its manifest, its folder, an image, the next line
            "moment"  count milliseconds later, wherever the command is then
            "power"   at the count-th fsync, or at the end: what a disk holds that lost everything not flushed is laid out in `disk`
    stage, step       it counts from the metrics line of that step on, or of a later one of the stage; without them, from the start
    signal  what comes at that moment; without it SIGKILL
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
from collections.abc import Callable, Mapping
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
at_the_end: list[Callable[[], None]] = []


def die(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)
    if number == signal.SIGKILL:
        time.sleep(60)  # the signal comes to the process before this thread goes on


def watched_fsync(descriptor: int) -> None:
    global writes
    writes += 1
    fsync(descriptor)


class Disk:
    """What outlasts a power cut: the bytes a file had when it was flushed, under the names its folder had when that was flushed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bytes: dict[int, bytes] = {}  # by inode
        self.held: dict[int, int] = {}  # inode to a descriptor: while one is open, nothing new gets the number of what is removed
        self.names: dict[int, dict[str, int]] = {}  # of a folder, by inode: what lies in it
        self.keep_all()

    def keep_all(self) -> None:
        for path in (self.root, *self.root.rglob("*")):
            self.keep(path)

    def keep(self, path: Path) -> None:
        if path.is_dir():
            here = self.names[self.inode(path)] = {inner.name: self.inode(inner) for inner in path.iterdir()}
            for there in self.names.values():  # a folder has one name: it moves in one step of the journal, or not at all
                for name, inner in list(there.items()):
                    if there is not here and inner in here.values() and inner not in self.bytes:
                        del there[name]
        else:
            self.bytes[self.inode(path)] = path.read_bytes()

    def inode(self, path: Path) -> int:
        number = path.stat().st_ino
        if number not in self.held:
            self.held[number] = os.open(path, os.O_RDONLY)
        return number

    def lay_out(self, place: Path, inode: int) -> None:
        place.mkdir()
        for name, inner in self.names.get(inode, {}).items():
            if inner in self.names or not (inner in self.bytes or name.endswith(".lock")):
                self.lay_out(place / name, inner)
            else:
                (place / name).write_bytes(self.bytes.get(inner, b""))


def watch_power(fault: Mapping[str, Any]) -> None:
    """Cut the power at a flush, or when the process ends."""
    root = Path.cwd()
    disk, count, sync = Disk(root), int(fault["count"]), os.sync

    def cut() -> None:
        disk.lay_out(Path(fault["disk"]), root.stat().st_ino)

    def fsync_and_keep(descriptor: int) -> None:
        nonlocal count
        if not count:
            cut()
            die()
        count -= 1
        watched_fsync(descriptor)
        disk.keep(Path(f"/proc/self/fd/{descriptor}").readlink())

    def sync_and_keep() -> None:
        sync()
        disk.keep_all()

    os.fsync, os.sync = fsync_and_keep, sync_and_keep
    at_the_end.append(cut)


def arm(fault: Mapping[str, Any]) -> None:
    """Have this process fail as told."""
    if fault["where"] == "power":
        watch_power(fault)
        return
    count, where, armed = int(fault["count"]), fault["where"], threading.Event()

    def begin() -> None:
        armed.set()
        if where == "moment":
            threading.Timer(count / 1000, die, [fault.get("signal", signal.SIGKILL)]).start()

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
    except KeyboardInterrupt:  # before the command's first line
        return 128 + signal.SIGINT
    return 0


def run(request: Mapping[str, Any]) -> dict[str, int]:
    """In a child; how often it flushed comes back through a pipe, if it lives to say so."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        os.close(reading)
        code = child(request)
        for action in at_the_end:
            action()
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
