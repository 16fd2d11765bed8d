"""kill -9 in every stage, at steps and in writes drawn at random: the same command ends with the bytes of a run that nobody killed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from engines import store

ROOT = Path(__file__).parent.parent.parent
RUN = Path("runs/digits-lt")
STAGES = ("source", "target", "guide")
STEPS = 16
WRITES_OF_A_CHECKPOINT = 14  # fsyncs of files and folders, at most: 5 files of tensors and JSON, the manifest, the folder
SETTINGS = (  # every kind of state that a checkpoint holds: a timestep sampler's history, held-out bests, prototypes, micro-batches
    *(f"{stage}.train_steps={STEPS}" for stage in STAGES),
    *(f"{stage}.save_every_steps=3" for stage in STAGES),
    *(f"{stage}.batch_size=12" for stage in STAGES),
    "source.accumulate=2",
    "source.sample_every_steps=7",
    "source.workers=2",
    "target.workers=0",
    "target.group_size=3",
    "target.holdout_fraction=0.2",
    "target.holdout_every_steps=4",
    "target.patience=9",
    "diffusion.timestep_sampler=loss-second-moment",
    "unet.dropout=0.1",
)


class Training:
    """`diffrc train` in children of one process that has torch loaded."""

    def __init__(self, settings: Sequence[str], messages: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).parent / "killable.py")]
        self.messages = messages  # all of stderr; a pipe that nobody reads would fill up
        with messages.open("w") as stderr:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
            )
        self.words = ["train", "digits-lt", *(word for item in settings for word in ("--set", item))]

    def __call__(self, folder: Path, kill: dict[str, Any] | None = None) -> int:
        """Train in a folder, killed or to the end. Returns the exit status, -9 where the kill came."""
        assert self.process.stdin and self.process.stdout
        folder.mkdir(exist_ok=True)
        self.process.stdin.write(json.dumps({"words": self.words, "cwd": str(folder), "kill": kill}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def said(self) -> str:
        return self.messages.read_text()[-2000:]


@pytest.fixture(scope="module")
def train(tiny_settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    training = Training([*tiny_settings, *SETTINGS], tmp_path_factory.mktemp("messages") / "stderr.txt")
    yield training
    training.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def whole(train: Training, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder) == 0
    return folder


def what_training_left(run: Path) -> dict[str, Any]:
    """sha256 of every file of the three stages, and their figures; only the time that a step took may differ."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        for path in sorted(p for p in (run / stage).rglob("*") if p.is_file()):
            name = path.relative_to(run).as_posix()
            if path.name == "metrics.jsonl":
                found[name] = [{k: v for k, v in line.items() if "second" not in k} for line in store.read_json_lines(path)]
            else:
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def kills(stage: str, count: int, seed: int) -> list[dict[str, Any]]:
    """So many kills of a stage, in the order of their steps; places and moments at random, each kind in its turn."""
    draw = random.Random(f"{stage} {seed}")
    plan = []
    for i, step in enumerate(sorted(draw.randint(1, STEPS) for _ in range(count))):
        where = ("write", "moment", "line")[i % 3]
        top = {"write": WRITES_OF_A_CHECKPOINT, "moment": 60, "line": 1}[where]
        plan.append({"stage": stage, "step": step, "where": where, "count": draw.randint(0, top)})
    return plan


def killed_run(train: Training, whole: Path, folder: Path, plan: Sequence[dict[str, Any]]) -> tuple[Path, int]:
    """A run killed as planned, then trained to its end. It starts from the stages before the first one that is killed.

    Returns: the run folder, and how many kills came before the end of the run.
    """
    stage = plan[0]["stage"]
    shutil.copytree(whole, folder)
    for later in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(folder / RUN / later)
    ends = [train(folder, kill) for kill in plan]
    assert set(ends) <= {-9, 0}, train.said()
    assert train(folder) == 0, train.said()
    return folder / RUN, ends.count(-9)


def test_a_run_killed_twice_in_every_stage_ends_with_the_bytes_of_one_that_was_not(train: Training, whole: Path, tmp_path: Path) -> None:
    plan = [kill for stage in STAGES for kill in kills(stage, 2, seed=2)]
    run, killed = killed_run(train, whole, tmp_path / "killed", plan)
    assert killed == len(plan)
    assert what_training_left(run) == what_training_left(whole / RUN)
    assert [path for path in run.rglob("*") if path.name.endswith(".tmp")] == [], "of a killed writer nothing is left"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_twenty_times_ends_with_the_bytes_of_one_that_was_not(
    train: Training, whole: Path, tmp_path: Path, stage: str
) -> None:
    run, killed = killed_run(train, whole, tmp_path / "killed", kills(stage, 20, seed=20))
    assert killed >= 17, "late kills may find the stage at its end"
    assert what_training_left(run) == what_training_left(whole / RUN)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_first_checkpoint_may_be_cut_off_at_any_of_its_writes(train: Training, whole: Path, tmp_path: Path) -> None:
    for count in range(WRITES_OF_A_CHECKPOINT):
        kill = {"stage": "guide", "step": 3, "where": "write", "count": count}
        run, killed = killed_run(train, whole, tmp_path / str(count), [kill])
        assert killed == 1
        assert what_training_left(run) == what_training_left(whole / RUN)
