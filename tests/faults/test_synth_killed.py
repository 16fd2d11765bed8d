"""`diffrc synth` killed by kill -9 at random moments: after the same command nothing is missing, nothing twice, nothing torn."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

RUN = Path("runs/digits-lt")
WORDS = ("synth", "--class", "nine", "--n", "40", "--engine", "torch", "--steps", "6")
LONGEST_MS = 900  # a little more than the command takes


def killed(count: int, diffrc: Any, left_by: Any, run: Path, folder: Path) -> None:
    """Kill so many commands, each in a folder where the one before was killed; every eighth folder is then finished and compared."""
    draw = random.Random(count)
    shutil.copytree(run, folder / "whole" / RUN)
    assert diffrc(folder / "whole", (*WORDS, "--run", str(RUN))).code == 0
    whole = left_by(folder / "whole" / RUN / "synth", ("guidance.json", ".lock"))
    assert len([name for name in whole if name.endswith(".png") and "/" in name]) == 40
    ends = []
    for i in range(count):
        place = folder / f"killed {i // 8}"
        if i % 8 == 0:
            shutil.copytree(run, place / RUN)
        moment = draw.randint(0, LONGEST_MS)
        ends.append(diffrc(place, (*WORDS, "--run", str(RUN)), {"where": "moment", "count": moment}).code)
        if i % 8 == 7 or i == count - 1:
            assert diffrc(place, (*WORDS, "--run", str(RUN))).code == 0
            assert left_by(place / RUN / "synth", ("guidance.json", ".lock")) == whole
            assert not [path for path in place.rglob("*.tmp") if path.is_file()]
    assert set(ends) <= {-9, 0}
    assert ends.count(-9) >= 0.7 * count, "late moments may find the command at its end"


def test_ten_random_kills_lose_nothing(diffrc: Any, left_by: Any, tiny_run: Path, tmp_path: Path) -> None:
    killed(10, diffrc, left_by, tiny_run, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_random_kills_lose_nothing(diffrc: Any, left_by: Any, tiny_run: Path, tmp_path: Path) -> None:
    killed(100, diffrc, left_by, tiny_run, tmp_path)
