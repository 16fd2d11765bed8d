"""Loading an engine: no card, no load; nothing foreign reaches the runtime; the provider asked for, or nothing."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from engines.backends import ort_engine
from engines.backends.base import EngineCard, EngineFile, card_path, read_engine
from engines.backends.ort_engine import OrtEngine
from engines.errors import DataError, EngineError, ParityError


@pytest.fixture
def engine_path(exported: Any, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    path = tmp_path / "target.onnx"
    shutil.copy(exported.path, path)
    shutil.copy(card_path(exported.path), card_path(path))
    return path


def test_without_a_card_nothing_is_loaded(engine_path: Path) -> None:
    card_path(engine_path).unlink()
    with pytest.raises(EngineError, match="no card") as failure:
        OrtEngine.load(engine_path)
    assert failure.value.exit_code == 4


def test_without_a_file_the_card_is_of_no_use(engine_path: Path) -> None:
    engine_path.unlink()
    with pytest.raises(EngineError, match="no engine"):
        OrtEngine.load(engine_path)


@pytest.mark.parametrize("text", ["", "{}", "not json", '{"format": 2}', "[]"])
def test_a_card_that_is_none_is_refused(text: str, engine_path: Path) -> None:
    card_path(engine_path).write_text(text)
    with pytest.raises(EngineError, match="not the card"):
        OrtEngine.load(engine_path)


@pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 1.0])
def test_one_flipped_bit_is_refused(where: float, engine_path: Path) -> None:
    data = bytearray(engine_path.read_bytes())
    data[round(where * (len(data) - 1))] ^= 1
    engine_path.write_bytes(data)
    with pytest.raises(EngineError, match="not the file that its card describes"):
        OrtEngine.load(engine_path)


def test_a_truncated_file_is_refused(engine_path: Path) -> None:
    engine_path.write_bytes(engine_path.read_bytes()[:-1])
    with pytest.raises(EngineError):
        OrtEngine.load(engine_path)


def _external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def _external_in_a_branch(model: onnx.ModelProto) -> None:
    inner = helper.make_tensor("inner", TensorProto.FLOAT, [1], [0.0])
    _external_tensor(inner)
    constant = helper.make_node("Constant", [], ["c"], value=inner)
    branch = helper.make_graph([constant], "branch", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, [1])])
    model.graph.node.append(helper.make_node("If", ["condition"], ["unused"], then_branch=branch, else_branch=branch))


def _external_tensor(tensor: onnx.TensorProto) -> None:
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def _custom_domain(model: onnx.ModelProto) -> None:
    model.opset_import.add(domain="com.example", version=1)


def _custom_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "com.example"


def _local_function(model: onnx.ModelProto) -> None:
    model.functions.add(name="Conv", domain="")


def _renamed_input(model: onnx.ModelProto) -> None:
    model.graph.input[1].name = "timestep"


def _one_more_output(model: onnx.ModelProto) -> None:
    model.graph.output.add(name="more")


def _other_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 19


@pytest.mark.parametrize(
    "spoil",
    [_external, _external_in_a_branch, _custom_domain, _custom_operator, _local_function, _renamed_input, _one_more_output, _other_opset],
)
def test_a_model_of_another_kind_is_refused_before_a_session_is_made(
    spoil: Callable[[onnx.ModelProto], None], exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_engine, "session", lambda *_: pytest.fail("a session was made"))
    model = onnx.load_model_from_string(exported.path.read_bytes())
    spoil(model)
    with pytest.raises(DataError) as failure:
        OrtEngine(_with_own_card(model.SerializeToString(), exported.card), "target.onnx")
    assert failure.value.exit_code == 3


def test_bytes_that_are_no_model_are_refused(exported: Any) -> None:
    with pytest.raises(DataError, match="not an ONNX model"):
        OrtEngine(_with_own_card(b"\xff" * 64, exported.card), "target.onnx")


def test_numbers_that_are_not_those_of_the_card_fail_the_load_time_test(exported: Any) -> None:
    model = onnx.load_model_from_string(exported.path.read_bytes())
    (tensor,) = (t for t in model.graph.initializer if t.name == "unet.out.2.weight")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.001), tensor.name))
    with pytest.raises(ParityError) as failure:
        OrtEngine(_with_own_card(model.SerializeToString(), exported.card), "target.onnx")
    assert failure.value.exit_code == 6


def test_a_provider_that_is_not_here_is_an_error_and_no_fallback(exported: Any) -> None:
    with pytest.raises(EngineError, match="CUDAExecutionProvider"):
        OrtEngine(read_engine(exported.path), "target.onnx", provider=cast(Any, "CUDAExecutionProvider"))


def test_a_provider_that_the_runtime_replaces_silently_is_an_error(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", _FallenBack)
    with pytest.raises(EngineError, match="runs on CPUExecutionProvider, not on CUDAExecutionProvider"):
        OrtEngine(read_engine(exported.path), "target.onnx", provider=cast(Any, "CUDAExecutionProvider"))


def test_each_call_gives_a_tensor_of_its_own(exported: Any) -> None:
    engine = OrtEngine.load(exported.path, threads=1)
    x, t, y = torch.zeros(2, 1, 8, 8), torch.tensor([3, 40]), torch.tensor([0, 3])
    first = engine(x, t, y)
    kept = first.clone()
    second = engine(x, t, y)
    second.zero_()
    engine(x + 1, t, y)
    assert torch.equal(first, kept)
    assert first.dtype == torch.float32
    assert first.shape == (2, 2, 8, 8)


@pytest.mark.parametrize(
    ("shape", "t", "y"),
    [
        ((9, 1, 8, 8), [0] * 9, [0] * 9),  # more than max_batch
        ((1, 1, 8, 9), [0], [0]),
        ((1, 3, 8, 8), [0], [0]),
        ((1, 1, 8, 8), [50], [0]),  # T
        ((1, 1, 8, 8), [-1], [0]),
        ((1, 1, 8, 8), [0], [4]),
        ((1, 1, 8, 8), [0], None),
    ],
)
def test_a_caller_that_breaks_the_contract_meets_an_assertion(
    shape: tuple[int, ...], t: list[int], y: list[int] | None, exported: Any
) -> None:
    engine = OrtEngine.load(exported.path, threads=1)
    with pytest.raises(AssertionError):
        engine(torch.zeros(shape), torch.tensor(t), None if y is None else torch.tensor(y))


class _FallenBack:
    def __init__(self, *_: object, **__: object) -> None:
        pass

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


def _with_own_card(data: bytes, card: EngineCard) -> EngineFile:
    return EngineFile(data, card.model_copy(update={"file_sha256": hashlib.sha256(data).hexdigest()}))
