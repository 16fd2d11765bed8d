"""tests/bench_training.py runs from end to end; its figures are measured by hand, in a quiet moment (`make bench`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_training_bench_times_every_arm_in_both_precisions(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "bench_training.py"), "--tiny"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ours, target stage") == 2
    assert done.stdout.count("speed of our network over diffusers', plain loop: ") == 2
    assert done.stdout.count("seconds of a step of the target stage over one of the source stage: ") == 2
    assert list(tmp_path.iterdir()) == []
