"""--engine and --precision of export and synth: what is named runs or nothing does; auto says what it took and why."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from diffrc_cli.app import main
from engines import store
from engines.backends import choice, gate
from engines.backends.choice import BUILDS, Build
from engines.errors import EngineError


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Outcome]


def runs(build: Build) -> bool:
    try:
        choice.require(build)
    except EngineError:
        return False
    return True


needs_openvino = pytest.mark.skipif(not runs(BUILDS[1]), reason="OpenVINO is not installed")
needs_bf16 = pytest.mark.skipif(not runs(BUILDS[2]), reason="OpenVINO is not installed, or has no bf16 on this CPU")


@pytest.fixture
def call(exported_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """call("synth", "--fill") -> exit code, stdout, stderr, in a folder whose latest run is trained and exported to ONNX Runtime."""
    shutil.copytree(exported_run, tmp_path / "runs" / "digits-lt")
    store.write_json(tmp_path / "runs" / "latest.json", {"run": "digits-lt"})
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert isinstance(end.value.code, int)
        return Outcome(end.value.code, *capsys.readouterr())

    return run


NINE = ("synth", "--class", "nine", "--n")


@needs_openvino
def test_export_for_openvino_then_synth_with_it_and_auto_goes_on_with_what_began(call: Call) -> None:
    assert call(*NINE, "1", "--engine", "openvino").code == 4
    done = call("export", "--engine", "openvino", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert (told["kind"], told["precision"], told["measured_batch"]) == ("openvino", "fp32", 4)
    assert told["one_step_error"] <= told["tolerance"] == 1e-5
    made = call(*NINE, "1", "--engine", "openvino", "--json")
    assert made.code == 0, made.err
    assert (json.loads(made.out)["engine"], json.loads(made.out)["precision"]) == ("openvino", "fp32")
    more = call(*NINE, "2")
    assert more.code == 0, more.err
    assert "engine: openvino fp32 (the images there were made with it)" in more.err
    other = call(*NINE, "2", "--engine", "onnx")
    assert other.code == 5, "what is named is never replaced"
    assert "engine.kind = openvino there, onnx now" in other.err


@needs_bf16
def test_export_of_all_shows_each_engine_and_auto_tells_every_speed(call: Call) -> None:
    done = call("export", "--engine", "all")
    assert done.code == 0, done.err
    assert [name in done.out for name in ("onnx fp32", "openvino fp32", "openvino bf16")] == [True] * 3
    assert "ms an image at batch 4, torch" in done.out
    made = call(*NINE, "1")
    assert made.code == 0, made.err
    assert "the fastest when it was exported" in made.err
    assert all(str(build) in made.err for build in BUILDS)
    bf16 = json.loads(call(*NINE, "1", "--precision", "bf16", "--json", "--out", "other").out)
    assert (bf16["engine"], bf16["precision"]) == ("openvino", "bf16")


def test_without_openvino_what_is_named_stops_and_all_tells_what_it_left_out(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    done = call("export", "--engine", "openvino")
    assert done.code == 4
    assert 'pip install "diffrc[openvino]"' in done.err.splitlines()[-1]
    every = call("export", "--engine", "all")
    assert every.code == 0, every.err
    assert "left out: openvino bf16: OpenVINO cannot be imported" in every.err
    assert "onnx fp32" in every.out
    assert "no other is exported" in call(*NINE, "1").err


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("export", "--engine", "onnx", "--precision", "bf16"), 4, "no onnx engine computes in bf16"),
        ((*NINE, "1", "--engine", "onnx", "--precision", "bf16"), 4, "no onnx engine computes in bf16"),
        ((*NINE, "1", "--engine", "torch", "--precision", "fp16", "--device", "cpu"), 4, "fp16 on a GPU alone"),
        ((*NINE, "1", "--engine", "openvino", "--compile"), 2, 'needs synth.engine = "torch"'),
        (("export", "--engine", "openvino", "--device", "cuda"), 4, "OpenVINO runs on the CPU"),
        ((*NINE, "1", "--engine", "openvino", "--precision", "bf16"), 4, "not exported for openvino bf16"),
        (("export", "--opset", "17"), 2, "export.opset"),
        (("export", "--batch", "2"), 2, "exceeds export.max_batch 2"),
        (("export", "--diffusers", "d", "--engine", "onnx"), 2, "writes no engine"),
    ],
)
def test_what_cannot_be_had_is_refused_with_no_image(words: tuple[str, ...], code: int, says: str, call: Call) -> None:
    done = call(*words)
    assert done.code == code, done.err
    assert says in done.err
    assert not Path("runs/digits-lt/synth").exists()


def test_batch_and_opset_reach_the_card(call: Call) -> None:
    done = call("export", "--batch", "5", "--opset", "21", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert (told["max_batch"], told["opset"]) == (5, 21)


def test_a_wrong_engine_ends_with_code_6_its_numbers_and_nothing_published(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree("runs/digits-lt/engines")
    real: Any = gate.one_step_error
    monkeypatch.setattr(gate, "one_step_error", lambda *arguments: real(*arguments) + 0.5)
    done = call("export")
    assert done.code == 6
    assert "relative error 0.5 of one evaluation, 1e-05 allowed" in done.err
    assert "(the worst of 8 images; the median " in done.err
    assert "at least 40.0 dB asked for; 0 of 8 labels changed (by guide), 1 allowed; nothing was written" in done.err
    assert not list(Path("runs/digits-lt").rglob("*.onnx"))
    assert not list(Path("runs/digits-lt").rglob("target*.json"))
