"""diffrc under torchrun: two processes train into one folder and speak as one; every other command refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engines import store
from engines.training.stages import load_guide, load_unet

ROOT = Path(__file__).parent.parent.parent

Diffrc = Callable[..., subprocess.CompletedProcess[str]]


def torchrun(folder: Path, *words: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "--"]
    return subprocess.run(
        [*launcher, "diffrc_cli", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.slow
def test_two_processes_train_a_run_that_is_complete_and_is_told_of_once(tiny_settings: tuple[str, ...], tmp_path: Path) -> None:
    words = [word for item in tiny_settings for word in ("--set", item)]
    done = torchrun(tmp_path, "train", "digits-lt", "--run", "here", "--log", "tensorboard", *words)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["source: trained 4 steps", "target: trained 4 steps", "guide: trained 4 steps"]
    assert lines[-2:] == ["run: here", "next: diffrc export --run here"]
    assert len(lines) == len(set(lines)), "the table of the guide between them is told once too"
    run = store.open_run(tmp_path / "here")
    assert not load_unet(run).training
    assert not load_guide(run).training
    assert {path.name for path in (tmp_path / "here" / "tensorboard").iterdir()} == {"source", "target", "guide"}
    assert set(store.open_run(tmp_path / "here").cost()) == {"train.source", "train.target", "train.guide"}
    refused = torchrun(tmp_path, "train", "digits-lt", "--run", "here", *words, "--set", "source.batch_size=9")
    assert refused.returncode != 0
    told = [line for line in refused.stderr.splitlines() if line.startswith(("error:", "try:"))]
    assert told == [
        "error: source.batch_size 9 has no 2 equal parts: 2 processes, source.accumulate 1",
        "try:   --set source.batch_size=10, or another --nproc-per-node",
    ]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_other_commands_refuse_many_processes_and_one_of_them_says_so(rank: str, diffrc: Diffrc) -> None:
    done = diffrc("data", "ls", RANK=rank, WORLD_SIZE="2")
    assert done.returncode == 2
    assert done.stdout == ""
    said = "error: diffrc data runs in one process\ntry:   torchrun is for diffrc train; leave it out here\n"
    assert done.stderr == (said if rank == "0" else "")
