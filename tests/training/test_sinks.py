"""Sinks: what TensorBoard reads back, what Weights & Biases is told, and that neither can stop training."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.errors import EngineError, UsageError
from engines.synthesis.sheet import grid_png
from engines.training.sinks import PACKAGES, Sinks, TensorBoard, open_sinks

PNG = grid_png(torch.zeros(4, 1, 8, 8), 2)


def events(folder: Path) -> Any:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed")
    accumulator = reader.EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_tensorboard_reads_back_every_figure_and_the_grid_under_its_stage(tmp_path: Path) -> None:
    sinks = open_sinks(["tensorboard"], tmp_path, {}, print)
    sinks.write("source", 50, {"loss": 0.5, "lr": 1e-3})
    sinks.write("source", 100, {"loss": 0.25, "lr": 2e-3})
    sinks.image("source", 100, PNG)
    sinks.write("target", 50, {"loss": 4.0})
    sinks.close()
    source, target = events(tmp_path / "tensorboard" / "source"), events(tmp_path / "tensorboard" / "target")
    assert [(event.step, event.value) for event in source.Scalars("loss")] == [(50, 0.5), (100, 0.25)]
    assert [event.value for event in source.Scalars("lr")] == pytest.approx([1e-3, 2e-3])
    assert [(event.step, event.value) for event in target.Scalars("loss")] == [(50, 4.0)]
    image = source.Images("samples")[0]
    assert image.step == 100
    assert image.width >= 2 * 8


def test_steps_that_are_trained_again_count_once(tmp_path: Path) -> None:
    for steps in ((50, 100, 150), (100, 150, 200)):  # the first process was killed, the second continued from a checkpoint at 80
        sink = TensorBoard(tmp_path)
        for step in steps:
            sink.write("source", step, {"loss": float(len(steps) * step)})
        sink.close()
    assert [event.step for event in events(tmp_path / "source").Scalars("loss")] == [50, 100, 150, 200]


class FakeRun:
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def define_metric(self, name: str, **options: Any) -> None:
        self.calls.append(("define", (name, options.get("step_metric"))))

    def log(self, values: Mapping[str, Any]) -> None:
        self.calls.append(("log", dict(values)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


def fake_wandb(monkeypatch: pytest.MonkeyPatch, run: FakeRun, options: dict[str, Any]) -> None:
    def init(**given: Any) -> FakeRun:
        options.update(given)
        if given["name"] == "refused":
            raise RuntimeError("no API key configured")
        return run

    module = types.ModuleType("wandb")
    vars(module).update(init=init, Image=lambda array: ("image", array.shape))
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_wandb_is_told_each_stages_own_steps_and_resumes_the_run_of_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, options = FakeRun(), {}
    fake_wandb(monkeypatch, run, options)
    sinks = open_sinks(["wandb"], tmp_path / "my run", {"seed": 3}, print)
    sinks.write("source", 50, {"loss": 0.5})
    sinks.image("source", 50, PNG)
    sinks.close()
    first = options["id"]
    open_sinks(["wandb"], tmp_path / "my run", {"seed": 3}, print)
    assert options["id"] == first
    open_sinks(["wandb"], tmp_path / "another" / "my run", {"seed": 3}, print)
    assert options["id"] != first
    assert {key: options[key] for key in ("name", "resume", "config")} == {
        "name": "my run",
        "resume": "allow",
        "config": {"seed": 3},
    }
    assert run.calls[:3] == [
        ("define", ("source/step", None)),
        ("define", ("source/*", "source/step")),
        ("log", {"source/step": 50, "source/loss": 0.5}),
    ]
    assert run.calls[3][1]["source/samples"][0] == "image"
    assert run.calls[4:] == [("finish", None)]


def test_a_service_that_cannot_start_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_wandb(monkeypatch, FakeRun(), {})
    with pytest.raises(EngineError, match="wandb cannot start: no API key configured"):
        open_sinks(["wandb"], tmp_path / "refused", {}, print)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_the_line_that_installs_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)  # the import system's word for a module that is not there
    with pytest.raises(EngineError, match=f"needs the package {name}") as refusal:
        open_sinks([name], tmp_path, {}, print)
    assert refusal.value.remedy == "pip install 'diffrc[logging]'"


def test_an_unknown_sink_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no sink named 'wanda'"):
        open_sinks(["wanda"], tmp_path, {}, print)


class Broken:
    def __init__(self, at: str) -> None:
        self.at, self.calls = at, 0

    def _call(self, name: str) -> None:
        self.calls += 1
        if name == self.at:
            raise ConnectionError("the line is dead")

    def write(self, stage: str, step: int, figures: Mapping[str, float]) -> None:
        self._call("write")

    def image(self, stage: str, step: int, png: bytes) -> None:
        self._call("image")

    def close(self) -> None:
        self._call("close")


@pytest.mark.parametrize("at", ["write", "image", "close"])
def test_a_sink_that_fails_is_dropped_and_told_once_and_the_others_go_on(at: str) -> None:
    told: list[str] = []
    broken, whole = Broken(at), Broken("")
    sinks = Sinks({"broken": broken, "whole": whole}, told.append)
    for step in range(3):
        sinks.write("source", step, {})
        sinks.image("source", step, PNG)
    sinks.close()
    assert whole.calls == 7
    assert broken.calls == {"write": 1, "image": 2, "close": 7}[at]
    assert told == ["broken failed and is left out from here (the line is dead); metrics.jsonl goes on"]
