"""`auto` takes the fastest of what passed its gate and runs here, and says so; what is named is there or nothing runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from engines.backends import choice
from engines.backends.base import EngineFile, card_path, engine_path
from engines.backends.choice import BUILDS, Build, builds_of, choose
from engines.errors import EngineError

ONNX, OPENVINO, BF16 = Build("onnx", "fp32"), Build("openvino", "fp32"), Build("openvino", "bf16")
HALF = Build("onnx", "fp16")


@pytest.fixture
def publish(exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """publish({build: ms}) -> the ONNX file with a card for each; every runtime counts as installed."""
    monkeypatch.setattr(choice, "require", lambda _: None)

    def write(speeds: dict[Build, float]) -> Path:
        path = tmp_path / "target.onnx"
        for build, ms in speeds.items():
            file = engine_path(path, *build)
            shutil.copy(exported.path, file)
            card = exported.card.model_copy(update={"kind": build.kind, "precision": build.precision, "ms_per_image": ms})
            card_path(file, *build).write_text(card.model_dump_json(), encoding="utf-8")
        return path

    return write


def anything(_: EngineFile) -> None:
    pass


def test_the_fastest_is_taken_and_the_others_speeds_are_told(publish: Any) -> None:
    chosen = choose(publish({ONNX: 3.0, OPENVINO: 4.0, BF16: 1.5}), BUILDS, anything)
    assert chosen.build == BF16
    assert chosen.why == "the fastest when it was exported: 1.5 ms an image and evaluation; onnx fp32 3 ms, openvino fp32 4 ms"
    assert choose(publish({ONNX: 3.0, OPENVINO: 2.0, BF16: 0.0}), BUILDS, anything).build == OPENVINO, "0 is not measured, not fast"


def test_of_what_was_named_the_fastest_is_taken(publish: Any) -> None:
    path = publish({ONNX: 1.0, OPENVINO: 2.0, BF16: 3.0})
    assert choose(path, builds_of("openvino", "auto"), anything).build == OPENVINO
    assert choose(path, builds_of("auto", "bf16"), anything).file == choose(path, (BF16,), anything).file
    assert choose(path, builds_of("auto", "fp32"), anything).build == ONNX


def test_each_file_lies_where_its_name_says(publish: Any) -> None:
    network = Path("engines/onnx/target.onnx")
    assert {str(build): str(engine_path(network, *build)) for build in BUILDS} == {
        "onnx fp32": "engines/onnx/target.onnx",
        "openvino fp32": "engines/onnx/target.onnx",
        "openvino bf16": "engines/onnx/target.onnx",
        "onnx fp16": "engines/onnx/target.fp16.onnx",
        "tensorrt fp32": "engines/tensorrt/target.plan",
        "tensorrt bf16": "engines/tensorrt/target.bf16.plan",
        "tensorrt fp16": "engines/tensorrt/target.fp16.plan",
    }
    chosen = choose(publish({ONNX: 3.0, HALF: 9.0}), BUILDS, anything)
    assert (chosen.build, choose(publish({ONNX: 3.0, HALF: 2.0}), builds_of("auto", "fp16"), anything).build) == (ONNX, HALF)


def test_fp16_is_not_taken_on_a_cpu_unasked_however_fast_it_was_once(publish: Any) -> None:
    path = publish({ONNX: 3.0, HALF: 2.0})
    chosen = choose(path, BUILDS, anything, device="cpu")
    assert (chosen.build, chosen.why) == (ONNX, "not onnx fp16: no faster than float32 on a CPU, and less exact")
    assert choose(path, (HALF,), anything, device="cpu").build == HALF
    assert choose(path, BUILDS, anything, "onnx fp16", device="cpu").build == HALF, "the images there were made with it"


def test_what_cannot_run_here_is_left_out_with_its_reason(publish: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def require(build: Build, opset: int = 0) -> None:
        if build.kind == "openvino":
            raise EngineError("OpenVINO cannot be imported", "pip")

    monkeypatch.setattr(choice, "require", require)
    path = publish({ONNX: 3.0, BF16: 1.0})
    chosen = choose(path, BUILDS, anything)
    assert (chosen.build, chosen.why) == (ONNX, "not openvino bf16: OpenVINO cannot be imported")
    assert chosen.own == "", "nothing was to be chosen between"
    with pytest.raises(EngineError, match="OpenVINO cannot be imported"):
        choose(path, builds_of("openvino", "auto"), anything)


def test_what_is_named_and_not_exported_is_an_error_with_the_line_to_type(publish: Any, tmp_path: Path) -> None:
    path = publish({ONNX: 3.0})
    with pytest.raises(EngineError, match="not exported for openvino bf16") as failure:
        choose(path, (BF16,), anything, command="diffrc export --run here")
    assert failure.value.remedy.startswith("diffrc export --run here --engine openvino --precision bf16")
    with pytest.raises(EngineError, match=r"not exported$") as failure:
        choose(tmp_path / "other.onnx", BUILDS, anything)
    assert (failure.value.exit_code, failure.value.remedy) == (4, "diffrc export; or --engine torch")


def test_an_engine_of_another_file_or_job_is_left_out(publish: Any) -> None:
    def not_openvino(file: EngineFile) -> None:
        if file.card.kind == "openvino":
            raise EngineError("of other weights", "")

    path = publish({ONNX: 3.0, OPENVINO: 1.0})
    assert choose(path, BUILDS, not_openvino).why == "not openvino fp32: of other weights"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(EngineError, match="not the file"):
        choose(path, BUILDS, anything)


def test_images_are_continued_with_the_engine_that_made_them_where_it_still_can(publish: Any) -> None:
    path = publish({ONNX: 3.0, BF16: 1.0})
    chosen = choose(path, BUILDS, anything, made_with="onnx fp32")
    assert (chosen.build, chosen.why) == (ONNX, "the images there were made with it")
    assert choose(path, BUILDS, anything, made_with="torch fp32").build == BF16
    assert choose(path, builds_of("openvino", "auto"), anything, made_with="onnx fp32").build == BF16, "what is named counts"


@pytest.mark.parametrize(
    ("engine", "precision", "able"),
    [("onnx", "bf16", "--engine openvino or tensorrt can"), ("openvino", "fp16", "--engine onnx or tensorrt can")],
)
def test_a_precision_that_an_engine_never_has_is_an_error(engine: Any, precision: Any, able: str) -> None:
    with pytest.raises(EngineError, match=f"no {engine} engine computes in {precision}") as failure:
        builds_of(engine, precision)
    assert failure.value.exit_code == 4
    assert able in failure.value.remedy


def test_an_opset_that_openvino_would_not_survive_is_refused_before_any_work() -> None:
    pytest.importorskip("openvino")
    choice.require(OPENVINO, 20)
    with pytest.raises(EngineError, match="OpenVINO takes opsets up to 20 here, not 21"):
        choice.require(OPENVINO, 21)
