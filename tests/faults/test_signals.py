"""A signal at any moment of any command: two lines, its exit code, no temporary file; the same command ends as if nothing had been."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

RUN = Path("runs/digits-lt")
OF_THIS_RUN = ("cost.jsonl", "guidance.json", "environment.json", "latest.json", ".lock")
JOBS = {
    "train": ("tiny_run", ("train", "--run", str(RUN), "--set", "guide.train_steps=6")),
    "synth": ("tiny_run", ("synth", "--run", str(RUN), "--class", "nine", "--n", "20", "--engine", "torch")),
    "evaluate": ("made_run", ("evaluate", "--run", str(RUN))),
}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LONGEST_MS = 700  # about what each of them takes
GRACE_SECONDS = 30


def stopped(name: str, moments: int, diffrc: Any, left_by: Any, folder: Path, request: pytest.FixtureRequest) -> None:
    base, words = JOBS[name]
    run = request.getfixturevalue(base)
    shutil.copytree(run, folder / "whole" / RUN)
    assert diffrc(folder / "whole", words).code == 0
    whole = left_by(folder / "whole", OF_THIS_RUN)
    draw = random.Random(name)
    for i in range(moments):
        place, number = folder / f"stopped {i}", SIGNALS[i % len(SIGNALS)]
        shutil.copytree(run, place / RUN)
        began = time.monotonic()
        moment = draw.randint(0, LONGEST_MS)
        code = diffrc(place, words, {"where": "moment", "count": moment, "signal": number}).code
        assert time.monotonic() - began < LONGEST_MS / 1000 + GRACE_SECONDS
        assert code in (128 + number, -number, 0), diffrc.said()  # -number: before the command's first line
        assert "Traceback" not in diffrc.said()
        assert not [path for path in place.rglob("*.tmp") if path.is_file()]
        assert diffrc(place, words).code == 0, diffrc.said()
        assert left_by(place, OF_THIS_RUN) == whole, f"{number.name} after {moment} ms"
        shutil.rmtree(place)


@pytest.mark.parametrize("name", JOBS)
def test_each_signal_at_some_moment_ends_a_command_cleanly_and_the_same_command_goes_on(
    name: str, diffrc: Any, left_by: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    stopped(name, 3, diffrc, left_by, tmp_path, request)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", JOBS)
def test_forty_signals_at_random_moments_lose_nothing(
    name: str, diffrc: Any, left_by: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    stopped(name, 40, diffrc, left_by, tmp_path, request)
