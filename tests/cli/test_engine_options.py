"""--engine and --precision of export and synth: what is named runs or nothing does; auto says what it took and why."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engines import store
from engines.backends import choice, export, gate, trt_engine
from engines.backends.choice import BUILDS, Build
from engines.errors import EngineError

Call = Callable[..., Any]  # (code, out, err)


def runs(build: Build) -> bool:
    try:
        choice.require(build)
    except EngineError:
        return False
    return True


needs_openvino = pytest.mark.skipif(not runs(BUILDS[1]), reason="OpenVINO is not installed")
needs_bf16 = pytest.mark.skipif(not runs(BUILDS[2]), reason="OpenVINO is not installed, or has no bf16 on this CPU")


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
    assert all(str(build) in made.err for build in BUILDS[:3])
    assert "left out: onnx fp16: no faster than float32 on a CPU" in done.err
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
        (("export", "--engine", "openvino", "--precision", "fp16"), 4, "no openvino engine computes in fp16"),
        (("export", "--engine", "openvino", "--opset", "21"), 4, "OpenVINO takes opsets up to 20 here, not 21"),
        (("export", "--engine", "tensorrt"), 4, "TensorRT cannot be imported"),
        ((*NINE, "1", "--engine", "tensorrt"), 4, "not exported for tensorrt fp32 or tensorrt bf16 or tensorrt fp16"),
        (("export", "--opset", "17"), 2, "export.opset"),
        (("export", "--batch", "2"), 2, "exceeds export.max_batch 2"),
        (("export", "--diffusers", "d", "--engine", "onnx"), 2, "writes no engine"),
    ],
)
def test_what_cannot_be_had_is_refused_with_no_image(
    words: tuple[str, ...], code: int, says: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    done = call(*words)
    assert done.code == code, done.err
    assert says in done.err
    assert not Path("runs/digits-lt/synth").exists()


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


@pytest.fixture
def exported_once(call: Call, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The engines' folder, emptied. Whoever exports the network again in float32 gets the file of before, without torch's seconds."""
    folder = Path("runs/digits-lt/engines")
    data = (folder / "onnx" / "target.onnx").read_bytes()
    monkeypatch.setattr(export, "onnx_bytes", lambda *_: data)
    shutil.rmtree(folder)
    return folder


@needs_openvino
def test_one_engine_that_fails_keeps_no_other_from_being_tried_and_the_worst_failure_ends_the_command(
    call: Call, exported_once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Any = gate.one_step_error

    def spoiled(engine: Any, *others: Any) -> float:
        return float(real(engine, *others)) + (0.5 if engine.card.kind == "onnx" else 0.0)

    monkeypatch.setattr(gate, "one_step_error", spoiled)
    done = call("export", "--engine", "all", "--precision", "fp32")
    assert done.code == 6
    assert "not exported: onnx fp32: target.onnx on onnx fp32 disagrees with torch" in done.err
    assert sorted(path.name for path in (exported_once / "onnx").iterdir()) == ["target.onnx", "target.openvino-fp32.json"]
    assert "openvino fp32" in done.out

    def refuse(*_: Any, **__: Any) -> None:
        raise EngineError("OpenVINO cannot compile it", "")

    shutil.rmtree(exported_once)
    monkeypatch.setattr(choice, "OpenVinoEngine", refuse)
    done = call("export", "--engine", "all", "--precision", "fp32")
    assert done.code == 6, "a wrong number is worse news than an engine that cannot be made"
    assert "not exported: openvino fp32: OpenVINO cannot compile it" in done.err
    assert [path.name for path in exported_once.iterdir()] == [".lock"]


@pytest.mark.slow
@needs_openvino
def test_batch_and_opset_reach_the_card_and_an_opset_that_openvino_would_not_survive_leaves_it_out(call: Call) -> None:
    done = call("export", "--engine", "all", "--precision", "fp32", "--batch", "5", "--opset", "21", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert (told["kind"], told["max_batch"], told["opset"]) == ("onnx", 5, 21)
    assert "left out: openvino fp32: OpenVINO takes opsets up to 20 here, not 21" in done.err


@pytest.mark.slow
def test_fp16_runs_on_a_cpu_too_and_is_never_taken_unless_it_is_asked_for(call: Call) -> None:
    done = call("export", "--precision", "fp16", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert (told["kind"], told["precision"], Path(told["file"]).name) == ("onnx", "fp16", "target.fp16.onnx")
    assert 1e-5 < told["one_step_error"] <= told["tolerance"] == 5e-3
    assert told["trajectory_psnr_db"] >= 30
    assert json.loads(call(*NINE, "1", "--precision", "fp16", "--json", "--out", "half").out)["precision"] == "fp16"
    made = call(*NINE, "1", "--json")
    assert (json.loads(made.out)["engine"], json.loads(made.out)["precision"]) == ("onnx", "fp32")
    assert "not onnx fp16: no faster than float32 on a CPU" in made.err


# ------------------------------------------------------------------------------------------------------------- TensorRT


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU with TensorRT, made of this CPU: see the file."""
    path = Path(__file__).parent.with_name("backends") / "fake_tensorrt.py"
    spec = importlib.util.spec_from_file_location("fake_tensorrt", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    machine = module.Machine()
    monkeypatch.setattr(trt_engine, "CudaDevice", lambda: machine)
    monkeypatch.setattr(choice, "device_of", lambda *_: torch.device("cpu"))  # where the fake's memory is
    return machine


def test_a_plan_is_built_once_run_and_never_loaded_where_its_key_is_another(call: Call, machine: Any) -> None:
    done = call("export", "--engine", "tensorrt", "--json")
    assert done.code == 0, done.err
    told, plan = json.loads(done.out), Path("runs/digits-lt/engines/tensorrt/target.plan")
    assert (told["kind"], told["precision"], told["device"], Path(told["file"])) == ("tensorrt", "fp32", "NVIDIA H200", plan)
    assert told["one_step_error"] <= told["tolerance"] == 1e-4
    assert (told["measured_batch"], told["ms_per_image"] > 0) == (4, True)
    assert json.loads(plan.with_suffix(".json").read_text())["build"]["batches"] == [1, 4, 8]
    assert call("export", "--engine", "tensorrt").code == 0
    assert len(machine.workspaces) == 1, "it is built once"
    made = call(*NINE, "1", "--engine", "tensorrt", "--json")
    assert made.code == 0, made.err
    assert json.loads(made.out)["engine"] == "tensorrt"

    card, network = json.loads(plan.with_suffix(".json").read_text()), Path("runs/digits-lt/engines/onnx/target.onnx")
    seen = machine.deserialized
    for field in card["build"]:
        other = {"batches": [1, 4, 7], "flags": []}.get(field, "other")
        store.write_json(plan.with_suffix(".json"), card | {"build": card["build"] | {field: other}})
        with pytest.raises(EngineError, match=f"built for something else: .*{field.split('_')[0]}"):
            choice.read(network, Build("tensorrt", "fp32"))
    stale = call(*NINE, "2", "--engine", "tensorrt")
    assert stale.code == 4
    assert "flags" in stale.err
    assert "diffrc export --engine tensorrt makes it anew" in stale.err
    store.write_json(plan.with_suffix(".json"), card)
    machine.gpu = machine.gpu._replace(driver="590.01")
    assert "driver" in call(*NINE, "2", "--engine", "tensorrt").err
    assert "not tensorrt fp32: " in call(*NINE, "2", "--out", "elsewhere").err, "auto goes on without it, and says so"
    assert machine.deserialized == seen
    assert call("export", "--engine", "tensorrt").code == 0
    assert len(machine.workspaces) == 2
    assert call(*NINE, "2", "--engine", "tensorrt").code == 0


@pytest.mark.slow
def test_a_plan_in_half_precision_is_built_from_the_file_that_was_cast(call: Call, machine: Any) -> None:
    done = call("export", "--engine", "tensorrt", "--precision", "bf16", "--json")
    assert done.code == 0, done.err
    told, engines = json.loads(done.out), Path("runs/digits-lt/engines")
    assert (told["precision"], told["tolerance"], told["opset"]) == ("bf16", 2e-2, 22)
    assert {path.name for path in (engines / "onnx").glob("*bf16*")} == {"target.bf16.onnx", "target.bf16.json"}
    assert {path.name for path in (engines / "tensorrt").glob("target*")} == {"target.bf16.plan", "target.bf16.json"}
    made = call(*NINE, "1", "--engine", "tensorrt", "--precision", "bf16", "--json")
    assert json.loads(made.out)["precision"] == "bf16", made.err
    (engines / "onnx" / "target.bf16.json").unlink()
    assert "there is no card" in call(*NINE, "2", "--engine", "tensorrt", "--precision", "bf16").err, (
        "what it was built from cannot be told"
    )


def test_a_plan_with_wrong_numbers_is_not_published(call: Call, machine: Any) -> None:
    machine.spoil["out"] = lambda value: value * value.dtype.type(1.0005)  # far within the self-test of a load
    done = call("export", "--engine", "tensorrt")
    assert done.code == 6
    assert "target.plan on tensorrt fp32 disagrees with torch: relative error 0.0005 of one evaluation, 0.0001 allowed" in done.err
    assert not list(Path("runs").rglob("*.plan"))


def test_tensorrt_without_a_gpu_is_refused_and_left_out_of_all(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4.0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = call("export", "--engine", "tensorrt")
    assert done.code == 4
    assert "TensorRT needs an NVIDIA GPU" in done.err
    every = call("export", "--engine", "all", "--precision", "fp32")
    assert every.code == 0, every.err
    assert "left out: tensorrt fp32: TensorRT needs an NVIDIA GPU" in every.err
