"""Loading an engine: no card, no load; nothing foreign reaches the runtime; the provider asked for, or nothing."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from engines.backends import ort_engine
from engines.backends.base import EngineCard, EngineFile, card_path, example_input, read_engine, relative_error
from engines.backends.device import OutOfMemory
from engines.backends.ort_engine import CUDA, TENSORRT, OrtEngine
from engines.backends.torch_engine import TorchEngine
from engines.errors import DataError, EngineError, ParityError


def _load_fake() -> Any:
    """The file beside this one; test folders are no packages."""
    spec = importlib.util.spec_from_file_location("fake_onnxruntime", Path(__file__).with_name("fake_onnxruntime.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


fake = _load_fake()
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """on(starts=..., forgets=...) -> a GPU that the runtime of this test has."""

    def make(**how: Any) -> Any:
        gpu = fake.Gpu(**how)
        monkeypatch.setitem(sys.modules, "onnxruntime", fake.module(gpu))
        return gpu

    return make


@pytest.fixture
def _cuda_starts() -> None:
    try:
        ort_engine.require_runtime(CUDA)
    except EngineError as error:
        pytest.skip(error.problem)


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


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="this ONNX Runtime lists it")
def test_a_provider_that_is_not_here_is_an_error_and_no_fallback(exported: Any) -> None:
    with pytest.raises(EngineError, match="no CUDAExecutionProvider"):
        OrtEngine(read_engine(exported.path), "target.onnx", provider=CUDA)


def test_a_provider_that_the_runtime_replaces_silently_is_an_error(exported: Any, on: Callable[..., Any]) -> None:
    on(starts=())
    started = time.perf_counter()
    with pytest.raises(EngineError, match="runs on CPUExecutionProvider, not on CUDAExecutionProvider") as failure:
        OrtEngine(read_engine(exported.path), "target.onnx", provider=CUDA)
    assert failure.value.exit_code == 4
    assert "CUDA 13.0 and cuDNN 9" in failure.value.remedy
    assert time.perf_counter() - started < 10


def test_a_provider_that_raises_instead_is_an_error_as_well(exported: Any, on: Callable[..., Any]) -> None:
    on(starts=(CUDA,))
    with pytest.raises(EngineError, match="TensorRT") as failure:
        OrtEngine(read_engine(exported.path), "target.onnx", provider=TENSORRT)
    assert "libnvinfer.so.10" in failure.value.remedy


def test_what_a_provider_lacks_is_named(on: Callable[..., Any], tmp_path: Path) -> None:
    on(starts=())
    sys.modules["onnxruntime"].__file__ = str(tmp_path / "onnxruntime" / "__init__.py")  # whose library is missing
    with pytest.raises(EngineError, match=r"libonnxruntime_providers_cuda\.so: cannot open shared object file"):
        ort_engine.require_runtime(CUDA)


@pytest.mark.parametrize("provider", [CUDA, TENSORRT])
def test_on_a_gpu_the_numbers_are_those_of_the_cpu(provider: ort_engine.Provider, exported: Any, on: Callable[..., Any]) -> None:
    gpu = on()
    engine, reference = OrtEngine.load(exported.path, provider=provider, stream=gpu), OrtEngine.load(exported.path)
    for batch in (1, 2, 7):
        x, t, y = example_input(engine.card, batch, 3)
        torch.testing.assert_close(engine(x.transpose(2, 3), t, y), reference(x.transpose(2, 3), t, y), rtol=1e-6, atol=1e-6)
    assert gpu.runs[-3:] == [1, 2, 7]


def test_on_a_gpu_too_each_call_gives_a_tensor_of_its_own(exported: Any, on: Callable[..., Any]) -> None:
    engine = OrtEngine.load(exported.path, provider=CUDA, stream=on())
    x, t, y = example_input(engine.card, 2, 3)
    first = engine(x, t, y)
    kept = first.clone()
    engine(x + 1, t, y).zero_()
    assert torch.equal(first, kept)


def test_threads_take_turns_on_a_gpu(exported: Any, on: Callable[..., Any]) -> None:
    engine = OrtEngine.load(exported.path, provider=CUDA, stream=on())
    inputs = [example_input(engine.card, 3, first_t) for first_t in range(8)]
    alone = [engine(*each) for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda each: engine(*each), inputs))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("option", ort_engine.CHECKED_OPTIONS)
def test_an_option_that_changes_the_numbers_and_is_not_taken_is_an_error(option: str, exported: Any, on: Callable[..., Any]) -> None:
    gpu = on(forgets=(option,))
    with pytest.raises(EngineError, match=f"another {option}"):
        OrtEngine.load(exported.path, provider=CUDA, stream=gpu)


def test_tf32_would_not_pass_for_float32(exported: Any, on: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_engine, "TF32", True)
    with pytest.raises(ParityError):
        OrtEngine.load(exported.path, provider=CUDA, stream=on())


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("Failed to allocate memory for requested buffer of size 536870912", OutOfMemory),
        ("CUDA failure 2: out of memory ; GPU=0", OutOfMemory),
        ("CUDA failure 719: unspecified launch failure", EngineError),
    ],
)
def test_what_a_gpu_fails_with_is_told_with_what_to_do(words: str, kind: type, exported: Any, on: Callable[..., Any]) -> None:
    gpu = on()
    engine = OrtEngine.load(exported.path, provider=CUDA, stream=gpu)
    gpu.fails_with = Exception(words)
    with pytest.raises(EngineError, match=words.split(":")[0]) as failure:
        engine(*example_input(engine.card, 1, 0))
    assert type(failure.value) is kind
    assert failure.value.exit_code == 4


def test_nothing_is_printed_while_a_provider_is_looked_for(on: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    on(starts=())
    with pytest.raises(EngineError):
        ort_engine.require_runtime(CUDA)
    assert capfd.readouterr() == ("", "")


@on_gpu
@pytest.mark.usefixtures("_cuda_starts")
def test_gpu_float32_is_within_its_limit_of_torch(exported: Any) -> None:
    engine = OrtEngine.load(exported.path, provider=CUDA)
    reference = TorchEngine(exported.unet, len(exported.schedule), 8)
    for batch in (1, 2, 7, 8):
        x, t, y = example_input(engine.card, batch, 3)
        found = engine(x.cuda(), t.cuda(), None if y is None else y.cuda())
        assert found.is_cuda
        assert relative_error(found.cpu(), reference(x, t, y)) < 1e-5


@on_gpu
@pytest.mark.usefixtures("_cuda_starts")
def test_gpu_work_that_is_queued_before_and_after_is_in_order(exported: Any) -> None:
    """A long product in front of x, and results overwritten right away: a run out of order reads or leaves other numbers."""
    engine = OrtEngine.load(exported.path, provider=CUDA)
    x, t, y = (value.cuda() for value in example_input(engine.card, 8, 3))
    expected = engine(x, t, y).cpu()
    for _ in range(10):
        busy = torch.randn(4096, 4096, device="cuda")
        for _ in range(8):
            busy = (busy @ busy).tanh()
        found = engine(x + 0 * busy.sum(), t, y)
        kept = found.clone()
        found.zero_()
        torch.empty_like(x).fill_(float("nan"))
        assert torch.equal(kept.cpu(), expected)


@on_gpu
@pytest.mark.usefixtures("_cuda_starts")
def test_gpu_runs_repeat_themselves_bit_by_bit(exported: Any) -> None:
    engines = [OrtEngine.load(exported.path, provider=CUDA) for _ in range(2)]
    x, t, y = example_input(exported.card, 8, 3)
    first, *others = [engine(x, t, y) for engine in engines for _ in range(3)]
    assert all(torch.equal(first, other) for other in others)


@on_gpu
@pytest.mark.usefixtures("_cuda_starts")
def test_gpu_tensorrt_of_onnx_runtime_starts_or_is_refused(exported: Any) -> None:
    try:
        engine = OrtEngine.load(exported.path, provider=TENSORRT)
    except EngineError as error:
        pytest.skip(error.problem)
    except ParityError as error:  # its builder takes TF32 where nothing forbids it
        assert "disagrees" in error.problem
    else:
        assert engine.card.kind == "onnx"


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


def _with_own_card(data: bytes, card: EngineCard) -> EngineFile:
    return EngineFile(data, card.model_copy(update={"file_sha256": hashlib.sha256(data).hexdigest()}))


def test_two_wheels_of_the_runtime_side_by_side_are_refused_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_engine, "onnxruntime_wheels", lambda: ["onnxruntime", "onnxruntime-gpu"])
    with pytest.raises(EngineError, match="onnxruntime and onnxruntime-gpu are installed side by side") as refused:
        ort_engine.require_runtime()
    assert "pip uninstall onnxruntime onnxruntime-gpu" in refused.value.remedy
