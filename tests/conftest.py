"""What tests of several rooms share: one thread, the command line as a user runs it, and a tiny run trained once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Two OpenMP threads on a loaded machine wait for each other more than they work; torch reads this when it is imported, and
# so do the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # diffusers, the reference of some tests, imports huggingface_hub: it must not ask the network

ROOT = Path(__file__).parent.parent

Diffrc = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """For a torch that a plugin imported before this file was read."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _short_gate() -> None:
    """Trajectories of 64 images would take longer than all else in the tests of engines."""
    from engines.backends import gate

    gate.TRAJECTORY_IMAGES = 8


@pytest.fixture
def diffrc(tmp_path: Path) -> Diffrc:
    """diffrc("recipe", "ls", COLUMNS="40") -> the finished process, its output as text. It starts in tmp_path."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TERM", "LC_ALL")}
        return subprocess.run(
            [sys.executable, "-m", "diffrc_cli", *arguments],
            cwd=tmp_path,
            env={**clean, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            encoding="utf-8",
            timeout=120,
            stdin=subprocess.DEVNULL,
        )

    return run


@pytest.fixture(scope="session")
def tiny_settings() -> tuple[str, ...]:
    """What `--set` makes of digits-lt so that it trains in a second: every stage, every file, no quality."""
    stages = ("source", "target", "guide")
    return (
        "data.head_count=24",
        "data.imbalance=8.0",
        "data.test_per_class=4",
        "unet.model_channels=16",
        "unet.num_head_channels=16",
        "guide.model_channels=16",
        "guide.num_head_channels=16",
        "guide.embedding_dim=16",
        "source.train_on=head",  # the paper's division of labor: the source knows the head, the target the tail
        "target.adapt_on=medium+few",
        *(f"{stage}.{key}" for stage in stages for key in ("train_steps=4", "batch_size=8", "warmup_steps=2", "save_every_steps=2")),
        *(f"{stage}.log_every_steps=1" for stage in stages),
        *(f"{stage}.sample_every_steps=0" for stage in ("source", "target")),
        "synth.steps=4",
        "synth.batch_size=4",
        "synth.fused=false",  # exporting the guide takes twenty seconds: who tests that says so
        "export.max_batch=8",
        "recognizer.train_steps=4",
        "recognizer.warmup_steps=1",
        "recognizer.seeds=1",
    )


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_settings: tuple[str, ...]) -> Path:
    """The folder of a trained tiny run of the digits: source, target and guide. To be read only; `tiny_copy` may be changed."""
    import torch

    from diffrc_cli.recipe import embedded
    from engines import store
    from engines.data.longtail import prepare
    from engines.recipe import load
    from engines.training.stages import train_run

    recipe = load(embedded()["digits-lt"].read_text(encoding="utf-8"), tiny_settings)
    path = tmp_path_factory.mktemp("tiny") / "runs" / "digits-lt"
    with store.locked(path):
        train_run(store.create_run(path, recipe), prepare(recipe.data, None), torch.device("cpu"))
    return path


@pytest.fixture
def tiny_copy(tiny_run: Path, tmp_path: Path) -> Path:
    """The tiny run, copied to tmp_path/runs/digits-lt, with the pointer that makes it the latest run of that folder."""
    path = tmp_path / "runs" / "digits-lt"
    shutil.copytree(tiny_run, path)
    (path.parent / "latest.json").write_text('{"run": "digits-lt"}', encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def exported_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run with its network exported. To be read only."""
    from engines import store
    from engines.backends.export import export_run

    path = tmp_path_factory.mktemp("exported") / "runs" / "digits-lt"
    shutil.copytree(tiny_run, path)
    export_run(store.open_run(path))
    return path
