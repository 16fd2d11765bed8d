"""A disk that loses at a power cut what was not flushed: what a command said it wrote is there, and the same command goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

RUN = Path("runs/digits-lt")
OF_THIS_RUN = ("cost.jsonl", "guidance.json", "environment.json", "latest.json", ".lock")
NEVER = 10**9
JOBS = {
    "train": ("train", "--run", str(RUN), "--set", "guide.train_steps=6"),
    "synth": ("synth", "--run", str(RUN), "--class", "nine", "--n", "5", "--engine", "torch"),
    "data export": ("data", "export", "--run", str(RUN), "--out", "shared", "--format", "folder"),
}
BASES = {"train": "tiny_run", "synth": "tiny_run", "data export": "made_run"}


def cut(diffrc: Any, run: Path, name: str, place: Path, count: int) -> tuple[int, int]:
    """Begin a job in `place` and cut the power: what is left lies in `place`/../`place` after."""
    shutil.copytree(run, place / RUN)
    code, writes = diffrc(place, JOBS[name], {"where": "power", "count": count, "disk": str(place) + " after"})
    return code, writes


@pytest.mark.parametrize("name", JOBS)
def test_what_a_command_has_written_when_it_ends_outlasts_a_power_cut(
    name: str, diffrc: Any, left_by: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    code, writes = cut(diffrc, request.getfixturevalue(BASES[name]), name, tmp_path / "whole", NEVER)
    assert (code, writes > 0) == (0, True), diffrc.said()
    assert left_by(tmp_path / "whole after", (".lock",)) == left_by(tmp_path / "whole", (".lock",))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", JOBS)
def test_the_power_may_be_cut_at_any_flush_and_the_same_command_ends_as_ever(
    name: str, diffrc: Any, left_by: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(BASES[name])
    code, writes = cut(diffrc, run, name, tmp_path / "whole", NEVER)
    assert code == 0, diffrc.said()
    whole = left_by(tmp_path / "whole", OF_THIS_RUN)
    for point in range(writes):
        place = tmp_path / f"cut {point}"
        assert cut(diffrc, run, name, place, point) == (-9, -1)
        after = Path(str(place) + " after")
        assert diffrc(after, JOBS[name]).code == 0, f"cut at flush {point} of {writes}: {diffrc.said()}"
        assert left_by(after, OF_THIS_RUN) == whole, f"cut at flush {point} of {writes}"
        shutil.rmtree(place)
        shutil.rmtree(after)
