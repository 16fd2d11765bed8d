"""kill -9 in every stage, at steps and in writes drawn at random: the same command ends with the bytes of a run that nobody killed."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

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


Train = Callable[..., int]


@pytest.fixture(scope="module")
def train(diffrc: Any, tiny_settings: tuple[str, ...]) -> Train:
    """train(folder, fault): the exit status of `diffrc train`, -9 where the kill came."""
    words = ["train", "digits-lt", *(word for item in (*tiny_settings, *SETTINGS) for word in ("--set", item))]
    return lambda folder, fault=None: int(diffrc(folder, words, fault).code)


@pytest.fixture(scope="module")
def whole(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder) == 0
    return folder


def what_training_left(run: Path, left_by: Callable[..., Any]) -> dict[str, Any]:
    """Of every file of the three stages."""
    return {stage: left_by(run / stage) for stage in STAGES}


def kills(stage: str, count: int, seed: int) -> list[dict[str, Any]]:
    """So many kills of a stage, in the order of their steps; places and moments at random, each kind in its turn."""
    draw = random.Random(f"{stage} {seed}")
    plan = []
    for i, step in enumerate(sorted(draw.randint(1, STEPS) for _ in range(count))):
        where = ("write", "moment", "line")[i % 3]
        top = {"write": WRITES_OF_A_CHECKPOINT, "moment": 60, "line": 1}[where]
        plan.append({"stage": stage, "step": step, "where": where, "count": draw.randint(0, top)})
    return plan


def killed_run(train: Train, whole: Path, folder: Path, plan: Sequence[dict[str, Any]]) -> tuple[Path, int]:
    """A run killed as planned, then trained to its end. It starts from the stages before the first one that is killed.

    Returns: the run folder, and how many kills came before the end of the run.
    """
    stage = plan[0]["stage"]
    shutil.copytree(whole, folder)
    for later in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(folder / RUN / later)
    ends = [train(folder, kill) for kill in plan]
    assert set(ends) <= {-9, 0}
    assert train(folder) == 0
    return folder / RUN, ends.count(-9)


def test_a_run_killed_twice_in_every_stage_ends_with_the_bytes_of_one_that_was_not(
    train: Train, whole: Path, left_by: Any, tmp_path: Path
) -> None:
    plan = [kill for stage in STAGES for kill in kills(stage, 2, seed=2)]
    run, killed = killed_run(train, whole, tmp_path / "killed", plan)
    assert killed == len(plan)
    assert what_training_left(run, left_by) == what_training_left(whole / RUN, left_by)
    assert [path for path in run.rglob("*") if path.name.endswith(".tmp")] == [], "of a killed writer nothing is left"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_twenty_times_ends_with_the_bytes_of_one_that_was_not(
    train: Train, whole: Path, left_by: Any, tmp_path: Path, stage: str
) -> None:
    run, killed = killed_run(train, whole, tmp_path / "killed", kills(stage, 20, seed=20))
    assert killed >= 17, "late kills may find the stage at its end"
    assert what_training_left(run, left_by) == what_training_left(whole / RUN, left_by)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_first_checkpoint_may_be_cut_off_at_any_of_its_writes(train: Train, whole: Path, left_by: Any, tmp_path: Path) -> None:
    for count in range(WRITES_OF_A_CHECKPOINT):
        kill = {"stage": "guide", "step": 3, "where": "write", "count": count}
        run, killed = killed_run(train, whole, tmp_path / str(count), [kill])
        assert killed == 1
        assert what_training_left(run, left_by) == what_training_left(whole / RUN, left_by)
