"""What tests of several rooms share: one thread, the command line as a user runs it, and a tiny run trained once."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from engines.store import RunFolder

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
def _no_network() -> None:
    """No test, and no command that one calls here, opens a connection out of this machine or asks for the address of a name."""
    here = ("127.0.0.1", "::1", "localhost", "", None, socket.gethostname())

    def watch(event: str, values: tuple[Any, ...]) -> None:
        if event == "socket.connect" and isinstance(values[1], tuple):
            assert values[1][0] in here, f"a connection to {values[1][0]}"
        elif event == "socket.getaddrinfo":
            assert values[0] in here, f"the address of {values[0]}"

    sys.addaudithook(watch)


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
        "synth.sampler=ddpm",  # the one with noise in every step
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


@pytest.fixture(scope="session")
def fill_with_noise() -> Callable[[RunFolder], None]:
    """fill_with_noise(run): the tail of a run filled with noise by no network at all. What comes after synthesis needs no more.

    In every filled class, image 1 is one that the selection dropped.
    """
    import numpy as np

    from engines import store
    from engines.synthesis.plan import Plan, fill_classes, keep_plan
    from engines.synthesis.sheet import Record, encode_png, pixels_sha256

    def fill(run: RunFolder) -> None:
        shape = [run.recipe.data.image_size_px, run.recipe.data.image_size_px, run.recipe.data.image_channels]
        identity = {"classes": run.classes()["names"], "model": "target", "engine.kind": "none", "synth.seed": 7}
        plan = Plan(identity, {"numpy": np.__version__})
        keep_plan(run.synth, plan)
        random = np.random.default_rng(0)
        for k, count in fill_classes(run).items():
            for index in range(count + 1):
                pixels = random.integers(0, 256, shape).astype(np.uint8)
                dropped: Any = "distance" if index == 1 else ""
                record = Record(plan.id, k, plan.names[k], index, 7, pixels_sha256(pixels), "{}", dropped=dropped)
                store.write_bytes(run.synth / record.path(), encode_png(pixels, record))

    return fill


@pytest.fixture(scope="session")
def made_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_settings: tuple[str, ...], fill_with_noise: Callable[[RunFolder], None]
) -> Path:
    """The folder of a run of the digits that was not trained, its tail filled with noise. To be read only; `made_copy` may be changed."""
    from diffrc_cli.recipe import embedded
    from engines import store
    from engines.data.longtail import prepare
    from engines.recipe import load

    recipe = load(embedded()["digits-lt"].read_text(encoding="utf-8"), (*tiny_settings, "recognizer.architecture=resnet8"))
    run = store.create_run(tmp_path_factory.mktemp("made") / "runs" / "digits-lt", recipe)
    run.keep_classes(prepare(recipe.data, None).table())
    fill_with_noise(run)
    return run.path


@pytest.fixture
def made_copy(made_run: Path, tmp_path: Path) -> Path:
    """`made_run`, copied to tmp_path/runs/digits-lt, with the pointer that makes it the latest run of that folder."""
    path = tmp_path / "runs" / "digits-lt"
    shutil.copytree(made_run, path)
    (path.parent / "latest.json").write_text('{"run": "digits-lt"}', encoding="utf-8")
    return path
