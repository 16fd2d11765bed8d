"""`--dry-run` of every long command: what is there, what is missing, what it would take; and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffrc_cli import app
from engines.study import forecast as study_forecast
from engines.synthesis import forecast as synthesis_forecast

Call = Callable[..., Any]

TOTALS = {"seconds_left", "disk_bytes", "free_bytes", "memory_bytes", "device", "folder"}


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second that a recognizer's step takes, two that a batch does; `test_a_batch_...` below measures one."""
    monkeypatch.setattr("engines.evaluation.forecast.measure", lambda *_: (0.5, 2**28))
    monkeypatch.setattr("engines.synthesis.forecast.measure", lambda *_: (2.0, 2**28))
    monkeypatch.setattr("engines.training.forecast.measure", lambda *_: 1.0)
    monkeypatch.setattr("engines.backends.forecast.image_seconds", lambda *_: 0.001)
    monkeypatch.setattr("engines.benchmark.speed.estimate_seconds", lambda *_: 60.0)


def files(path: Path) -> dict[str, int]:
    return {file.relative_to(path).as_posix(): file.stat().st_mtime_ns for file in path.rglob("*")}


@pytest.fixture
def planned(call: Call, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """planned("synth", "--fill") -> the JSON of its dry run, which left every file as it was."""

    def run(*words: str) -> dict[str, Any]:
        before = files(tmp_path)
        text, document = call(*words, "--dry-run"), call(*words, "--dry-run", "--json")
        assert (text.code, document.code) == (0, 0), text.err + document.err
        assert "about" in text.out
        assert files(tmp_path) == before
        found: dict[str, Any] = json.loads(document.out)
        return found

    return run


def test_every_long_command_has_a_dry_run() -> None:
    long = {"run", "train", "export", "synth", "evaluate", "study"}
    commands = {c.callback.__name__: c.callback for c in app.app.registered_commands if c.callback and c.callback.__name__ in long}
    assert {name for name, command in commands.items() if "plan" in command.__annotations__} == long


def test_images_that_are_there_count_and_the_others_come_in_batches(planned: Callable[..., dict[str, Any]], call: Call) -> None:
    (part,) = planned("synth", "--class", "nine", "--n", "6")["parts"]
    assert (part["missing"], part["batches"], part["kept_aside"]) == (6, 2, False), "four to a batch"
    assert call("synth", "--class", "nine", "--n", "2").code == 0
    found = planned("synth", "--class", "nine", "--class", "eight", "--n", "6")
    (part,) = found["parts"]
    assert [(c["class"], c["there"], c["missing"]) for c in part["classes"]] == [("nine", 2, 4), ("eight", 0, 6)]
    assert part["seconds_left"] == 2.0 * -(-part["batches"] // part["side_by_side"]) == found["seconds_left"]
    assert found["disk_bytes"] == 10 * (8 * 8 * 2 + 4096)
    assert set(found) >= TOTALS


def test_what_synthesis_would_refuse_is_refused(call: Call) -> None:
    assert call("synth", "--class", "nine", "--n", "2").code == 0
    refused = call("synth", "--class", "nine", "--n", "2", "--seed", "5", "--dry-run")
    assert refused.code == 5
    assert "images of another plan (synth.seed = 0 there, 5 now)" in refused.err


def test_an_engine_that_fits_is_kept_and_another_opset_is_exported(planned: Callable[..., dict[str, Any]]) -> None:
    found = planned("export")
    assert [(e["build"], e["current"], e["disk_bytes"]) for e in found["engines"]] == [("onnx fp32", True, 0)]
    assert found["seconds_left"] == 0
    changed = planned("export", "--opset", "18")
    assert [e["current"] for e in changed["engines"]] == [False]
    assert changed["seconds_left"] > 10
    assert changed["disk_bytes"] > 10_000


def test_recognizers_that_are_kept_are_told_from_those_that_are_left(made_copy: Path, call_in_empty: Call) -> None:
    before = files(made_copy)
    found = json.loads(call_in_empty("evaluate", "--dry-run", "--json").out)
    recognizers = 2 * 4 + 1  # methods, kinds of training, the oracle
    assert (found["recognizers"], found["kept"], found["steps_left"]) == (recognizers, 0, 4 * recognizers)
    assert found["seconds_left"] == 0.5 * found["steps_left"] / found["side_by_side"]
    assert files(made_copy) == before
    assert call_in_empty("evaluate").code == 0
    done = json.loads(call_in_empty("evaluate", "--dry-run", "--json").out)
    assert (done["recognizers"], done["kept"], done["seconds_left"]) == (recognizers, recognizers, 0)
    assert "9 recognizers, 9 of them trained and kept already" in call_in_empty("evaluate", "--dry-run").out
    more = json.loads(call_in_empty("evaluate", "--dry-run", "--json", "--seeds", "2").out)
    assert more["kept"] == recognizers


def test_a_bench_tells_what_it_would_time_and_make(planned: Callable[..., dict[str, Any]]) -> None:
    assert planned("bench", "--quick")["seconds_left"] == 60
    cells = planned("bench", "quality", "--samplers", "ddim", "--steps", "2,4", "--n", "14")["cells"]
    assert [(c["steps"], c["missing"]) for c in cells] == [(2, 14), (4, 14)]


def test_a_whole_run_tells_of_images_and_recognizers_too(call: Call, tmp_path: Path, tiny_settings: tuple[str, ...]) -> None:
    before = files(tmp_path)
    found = json.loads(call("run", "--run", "runs/digits-lt", "--dry-run", "--json").out)
    assert {stage["state"] for stage in found["stages"]} == {"complete"}
    assert [part["engine"] for part in found["synthesis"]] == ["onnx fp32"], "of the run's own engine"
    anew = [word for item in tiny_settings for word in ("--set", item)]
    found = json.loads(call("run", "digits-lt", "--run", "runs/new", "--dry-run", "--json", *anew).out)
    assert [part["engine"] for part in found["synthesis"]] == ["torch fp32"], "of the network as it will be"
    assert found["evaluation"]["recognizers"] == 9
    assert files(tmp_path) == before


def test_a_study_goes_by_operations_and_by_what_is_missing(
    call_in_empty: Call, tmp_path: Path, tiny_settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_forecast, "seconds_per_operation", lambda *_: 1e-9)
    monkeypatch.setattr("engines.training.cost._counted", lambda _: (1e6, 3e6, 2e6, 1e6))  # counting takes seconds, and has its own tests
    words = ["study", "controls", "--recipe", "digits-lt", "--seeds", "2", "--dry-run"]
    words += [word for item in tiny_settings for word in ("--set", item)]
    found = json.loads(call_in_empty(*words, "--json").out)
    assert found["images_seconds"] == pytest.approx(1e-9 * found["operations_left"])
    assert found["seconds_left"] == found["images_seconds"] + found["recognizers_seconds"]
    assert found["recognizers_seconds"] == 0.5 * 4 * found["recognizers"] / 2 or found["recognizers"] < 2
    one = json.loads(call_in_empty(*words, "--json", "--seeds", "1").out)
    assert found["operations_left"] == pytest.approx(2 * one["operations_left"])
    assert list(tmp_path.iterdir()) == []


def test_a_batch_is_measured_by_its_steps_those_with_guidance_apart(
    exported_run: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.undo()  # of the fixture above
    from engines import store
    from engines.synthesis.maker import open_maker

    run = store.open_run(exported_run, ("synth.guidance_interval=[0,600]",))
    maker = open_maker(run, "target")
    seconds, memory_bytes = synthesis_forecast.measure(maker)
    assert 0 < seconds < 20
    assert memory_bytes > 2**26
    timesteps = [999, 700, 400, 100]
    found = synthesis_forecast.extrapolated(maker, timesteps, [999, 700, 400], [1.0, 2.0, 5.0])
    assert found == 1 + 1 + 3 + 3, "two steps without guidance, two with it"
