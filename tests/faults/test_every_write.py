"""Every write of every command is cut off by kill -9, and fails for want of space: the same command ends with what it would have left."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

RUN = Path("runs/digits-lt")
OF_THIS_RUN = ("cost.jsonl", "index.html", "guidance.json", ".lock")  # what things took, and the figures of batches drawn twice


class Job(NamedTuple):
    """A command, and the fixture whose run it starts from."""

    base: str
    words: tuple[str, ...]


JOBS = {
    "train": Job("tiny_run", ("train", "--run", str(RUN), "--set", "guide.train_steps=6")),
    "export": Job("tiny_run", ("export",)),
    "synth": Job("tiny_run", ("synth", "--class", "nine", "--n", "5", "--engine", "torch")),
    "evaluate": Job("made_run", ("evaluate",)),
    "report": Job("made_run", ("report",)),
    "data export": Job("made_run", ("data", "export", "--out", "shared", "--format", "parquet")),
}
SLOW = ("export",)  # half a minute a time


class Bench:
    """A job that can be begun anew, cut off, and compared with one that nobody disturbed."""

    def __init__(self, job: Job, base: Path, diffrc: Any, left_by: Any, folder: Path) -> None:
        self.job, self.base, self.diffrc, self.left_by, self.folder = job, base, diffrc, left_by, folder
        code, self.writes = self.run(self.begin("whole"))
        assert code == 0, diffrc.said()
        self.left = self.left_in("whole")

    def begin(self, name: str) -> Path:
        place = self.folder / name
        shutil.copytree(self.base, place / RUN)
        (place / "runs" / "latest.json").write_text('{"run": "digits-lt"}')
        return place

    def run(self, place: Path, fault: dict[str, Any] | None = None) -> tuple[int, int]:
        code, writes = self.diffrc(place, self.job.words, fault)
        return code, writes

    def left_in(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.left_by(self.folder / name, OF_THIS_RUN)
        return {name: value for name, value in found.items() if not name.startswith("runs/.latest.json.")}  # the next run's to remove

    def points(self, count: int | None) -> list[int]:
        """So many of its writes, spread over all of them with the first and the last; None = every one."""
        if count is None or count >= self.writes:
            return list(range(self.writes))
        return sorted({round(i * (self.writes - 1) / (count - 1)) for i in range(count)})


@pytest.fixture
def bench(diffrc: Any, left_by: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], Bench]:
    return lambda name: Bench(JOBS[name], request.getfixturevalue(JOBS[name].base), diffrc, left_by, tmp_path)


def killed_anywhere(bench: Bench, count: int | None) -> None:
    for point in bench.points(count):
        place = bench.begin(f"killed {point}")
        assert bench.run(place, {"where": "write", "count": point}) == (-9, -1)
        assert bench.run(place)[0] == 0, f"killed at write {point} of {bench.writes}"
        assert bench.left_in(place.name) == bench.left, f"killed at write {point} of {bench.writes}"
        shutil.rmtree(place)


def failed_anywhere(bench: Bench, count: int | None) -> None:
    kinds = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EXDEV)
    for i, point in enumerate(bench.points(count)):
        place = bench.begin(f"failed {point}")
        assert bench.run(place, {"where": "write", "count": point, "error": kinds[i % len(kinds)]})[0] == 8, f"write {point}"
        assert not [path for path in place.rglob("*.tmp") if path.is_file()], f"write {point}"
        assert bench.run(place)[0] == 0, f"failed at write {point} of {bench.writes}"
        assert bench.left_in(place.name) == bench.left, f"failed at write {point} of {bench.writes}"
        shutil.rmtree(place)


@pytest.mark.parametrize("name", ["synth", "evaluate", "data export"])
def test_a_command_killed_or_out_of_disk_at_some_of_its_writes_leaves_in_the_end_what_it_would_have_left(name: str, bench: Any) -> None:
    work = bench(name)
    killed_anywhere(work, 2)
    failed_anywhere(work, 3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", JOBS)
def test_a_command_may_be_killed_at_every_single_write(name: str, bench: Any) -> None:
    killed_anywhere(bench(name), 10 if name in SLOW else None)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", JOBS)
def test_the_disk_may_fail_at_every_single_write(name: str, bench: Any) -> None:
    failed_anywhere(bench(name), 10 if name in SLOW else None)
