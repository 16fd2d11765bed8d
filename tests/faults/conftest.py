"""`diffrc` in children of one process that has torch loaded, to be killed and to be failed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from engines import store

ROOT = Path(__file__).parent.parent.parent
KILLED = -9


class Ended(NamedTuple):
    """A command's exit status, and how often it flushed a file or a folder to the disk (-1 where it was killed)."""

    code: int
    writes: int


class Diffrc:
    """One process that forks for every command."""

    def __init__(self, messages: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).parent / "killable.py")]
        self.messages = messages  # all of stderr; a pipe that nobody reads would fill up
        with messages.open("w") as stderr:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
            )

    def __call__(self, folder: Path, words: Sequence[str], fault: dict[str, Any] | None = None) -> Ended:
        """Run a command in a folder, failed as told or to its end; see killable.py."""
        assert self.process.stdin and self.process.stdout
        folder.mkdir(exist_ok=True)
        self.process.stdin.write(json.dumps({"words": list(words), "cwd": str(folder), "fault": fault}) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))

    def said(self) -> str:
        return self.messages.read_text()[-2000:]


@pytest.fixture(scope="session")
def diffrc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Diffrc]:
    """diffrc(folder, words, fault) -> Ended"""
    process = Diffrc(tmp_path_factory.mktemp("messages") / "stderr.txt")
    yield process
    process.process.communicate(timeout=60)


@pytest.fixture(scope="session")
def left_by() -> Callable[..., dict[str, Any]]:
    """left_by(folder): sha256 of every file in it by name; of lines and tables of figures all but the time that things took.

    Of a stage's checkpoints the newest: the one before is where the stage would go back to, and that is wherever it was last stopped.
    """

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if "second" not in k and "ms_per" not in k}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    def is_spare(path: Path) -> bool:
        place = path.parent
        return place.name.startswith("step-") and place != max(place.parent.glob("step-*[0-9]"))

    def left(folder: Path, but: Sequence[str] = ()) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in but and not is_spare(p)):
            name = path.relative_to(folder).as_posix()
            if path.suffix == ".jsonl":
                found[name] = timeless(store.read_json_lines(path))
            elif path.suffix == ".json":
                found[name] = timeless(store.read_json(path))
            else:
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    return left
