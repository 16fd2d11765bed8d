"""What training would take is measured on real steps, and asking for it changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from engines import store
from engines.data.longtail import LongTail, prepare
from engines.errors import ConflictError, DataError
from engines.recipe import read
from engines.training import forecast as forecasts
from engines.training.forecast import forecast

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tiny_run: Path) -> LongTail:
    return prepare(store.open_run(tiny_run).recipe.data, None)


@pytest.fixture
def half_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """That every step takes."""
    monkeypatch.setattr(forecasts, "measure", lambda *_: 0.5)


def files(path: Path) -> dict[str, int]:
    return {file.relative_to(path).as_posix(): file.stat().st_mtime_ns for file in path.rglob("*")}


def test_real_steps_are_measured_and_nothing_is_written(tiny_copy: Path, data: LongTail) -> None:
    shutil.rmtree(tiny_copy / "guide")
    before = files(tiny_copy)
    found = forecast(tiny_copy, read(tiny_copy / "recipe.toml", ("target.gamma=0.3",)), data, CPU)
    assert [stage.status.state for stage in found.stages] == ["complete", "stale", "to train"]
    assert [stage.steps_left for stage in found.stages] == [0, 4, 4]
    source, target, guide = (stage.images_per_second for stage in found.stages)
    assert source is None
    assert target and guide
    assert found.seconds_left == pytest.approx(4 * 8 / target + 4 * 8 / guide)
    assert files(tiny_copy) == before
    forecast(tiny_copy.parent / "other", store.open_run(tiny_copy).recipe, data, CPU)
    assert not (tiny_copy.parent / "other").exists()


@pytest.mark.usefixtures("half_a_second")
def test_time_and_disk_are_of_the_steps_that_are_left(tiny_copy: Path, data: LongTail) -> None:
    recipe = store.open_run(tiny_copy).recipe
    shutil.rmtree(tiny_copy / "guide" / "step-000000004")
    source, target, guide = forecast(tiny_copy, recipe, data, CPU).stages
    assert (source.seconds_left, source.disk_bytes, target.seconds_left, target.disk_bytes) == (0, 0, 0, 0)
    assert (guide.status.state, guide.steps_left, guide.seconds_left, guide.images_per_second) == ("at step 2", 2, 1.0, 16.0)
    whole = forecast(tiny_copy.parent / "other", recipe, data, CPU)
    assert whole.seconds_left == 6
    assert whole.stages[2].disk_bytes == 3 * 4 * 4 * guide.parameters, "two checkpoints and one that is being written"
    held = sum(file.stat().st_size for file in (tiny_copy / "guide").rglob("*.safetensors"))
    assert guide.disk_bytes == whole.stages[2].disk_bytes - held
    assert whole.free_bytes == pytest.approx(shutil.disk_usage(tiny_copy).free, rel=0.2)


def test_what_training_would_refuse_is_refused(tiny_copy: Path, data: LongTail, tmp_path: Path) -> None:
    recipe = store.open_run(tiny_copy).recipe
    other = prepare(recipe.data.model_copy(update={"profile_seed": 5}), None)
    with pytest.raises(ConflictError, match="other data"):
        forecast(tiny_copy, recipe, other, CPU)
    with pytest.raises(DataError, match=r"no\.safetensors"):
        forecast(tmp_path / "new", read(tiny_copy / "recipe.toml", ("source.pretrained=no.safetensors",)), data, CPU)
