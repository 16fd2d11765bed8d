"""The device asked for, or an error; TF32 off while it matters, and as it was afterwards; engines on a GPU, which is simulated."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.backends import choice, export
from engines.backends.base import EngineFile, card_path, example_input
from engines.backends.choice import Build, choose, device_of, load, read
from engines.backends.device import CPU, CudaStream, choose_device, device_name, exact_float32
from engines.backends.export import export_onnx
from engines.errors import EngineError, UsageError

GPU = torch.device("cuda")
H200 = "NVIDIA H200"
ONNX, OPENVINO, TENSORRT = Build("onnx", "fp32"), Build("openvino", "fp32"), Build("tensorrt", "fp32")


def _load_fake() -> Any:
    """The file beside this one; test folders are no packages."""
    spec = importlib.util.spec_from_file_location("fake_onnxruntime", Path(__file__).with_name("fake_onnxruntime.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """on(starts=...) -> the GPU of a computer whose torch sees one, and whose ONNX Runtime may."""
    fake = _load_fake()

    def make(**how: Any) -> Any:
        gpu = fake.Gpu(**how)
        monkeypatch.setitem(sys.modules, "onnxruntime", fake.module(gpu))
        monkeypatch.setattr(choice, "choose_device", lambda name: CPU if name == "cpu" else GPU)
        monkeypatch.setattr(choice, "CudaStream", lambda _: gpu)
        monkeypatch.setattr(choice, "require", lambda *_: None)
        for module in (choice, export):
            monkeypatch.setattr(module, "device_name", lambda device: H200 if device == GPU else "cpu")
        monkeypatch.setattr(export, "_moved", lambda unet, _: unet)
        return gpu

    return make


@pytest.fixture
def _switches_restored() -> Iterator[None]:
    before = _tf32()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_a_device_is_what_was_named_or_an_error() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda")
    with pytest.raises(UsageError, match="'tpu'"):
        choose_device("tpu")
    with pytest.raises(EngineError, match="cuda:99"):
        choose_device("cuda:99")


def test_the_cpu_has_a_name_too() -> None:
    assert device_name(CPU) == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a GPU")
def test_without_a_gpu_there_is_no_stream_of_one() -> None:
    with pytest.raises(EngineError, match="finds no NVIDIA GPU") as failure:
        CudaStream()
    assert failure.value.exit_code == 4


@pytest.mark.parametrize("before", [(False, True), (True, True), (False, False)])
@pytest.mark.usefixtures("_switches_restored")
def test_tf32_is_off_within_and_what_it_was_afterwards(before: tuple[bool, bool]) -> None:
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    with exact_float32(GPU), exact_float32(GPU):
        assert _tf32() == (False, False)
    assert _tf32() == before
    with pytest.raises(ValueError, match="inside"), exact_float32(GPU):
        raise ValueError("inside")
    assert _tf32() == before


@pytest.mark.usefixtures("_switches_restored")
def test_on_a_cpu_the_switches_are_left_alone() -> None:
    torch.backends.cudnn.allow_tf32 = True
    with exact_float32(CPU):
        assert torch.backends.cudnn.allow_tf32


def _tf32() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


# ------------------------------------------------------------------------------------------------------ engines on a GPU


def test_auto_is_the_gpu_where_the_runtime_can_use_it_and_what_is_named_is_there_or_an_error(on: Callable[..., Any]) -> None:
    on()
    assert [device_of(build, "auto") for build in (ONNX, OPENVINO, TENSORRT)] == [GPU, CPU, GPU]
    assert device_of(ONNX, "cpu") == CPU
    for build, name in ((OPENVINO, "cuda"), (TENSORRT, "cpu")):
        with pytest.raises(EngineError, match="runs on") as failure:
            device_of(build, name)
        assert failure.value.exit_code == 4


def test_a_runtime_whose_gpu_does_not_start_stays_on_the_cpu_and_says_so_unless_the_gpu_was_named(
    on: Callable[..., Any], publish: Callable[..., Path]
) -> None:
    on(starts=())
    assert device_of(ONNX, "auto") == CPU
    with pytest.raises(EngineError, match="runs on CPUExecutionProvider, not on CUDAExecutionProvider"):
        device_of(ONNX, "cuda")
    chosen = choose(publish({ONNX: ("cpu", 1.0)}), (ONNX,), anything)
    assert chosen.device == CPU
    assert chosen.why == "not on the GPU: a model of one addition runs on CPUExecutionProvider, not on CUDAExecutionProvider"


@pytest.fixture
def publish(exported: Any, tmp_path: Path) -> Callable[..., Path]:
    """publish({build: (device, ms)}) -> the ONNX file with a card for each."""

    def write(measured: dict[Build, tuple[str, float]]) -> Path:
        path = tmp_path / "target.onnx"
        shutil.copy(exported.path, path)
        for build, (device, ms) in measured.items():
            card = exported.card.model_copy(update={"kind": build.kind, "device": device, "ms_per_image": ms})
            card_path(path, *build).write_text(card.model_dump_json(), encoding="utf-8")
        return path

    return write


def anything(_: EngineFile) -> None:
    pass


def test_what_was_held_to_torch_on_another_device_is_not_taken_and_told(on: Callable[..., Any], publish: Callable[..., Path]) -> None:
    on()
    both = (ONNX, OPENVINO)
    here = choose(publish({ONNX: (H200, 0.1), OPENVINO: ("cpu", 2.0)}), both, anything)
    assert (here.build, here.device) == (ONNX, GPU)
    assert here.why == "the fastest when it was exported: 0.1 ms an image and evaluation; openvino fp32 2 ms"
    elsewhere = choose(publish({ONNX: ("cpu", 1.0), OPENVINO: ("cpu", 2.0)}), both, anything)
    assert (elsewhere.build, elsewhere.device) == (OPENVINO, CPU)
    assert elsewhere.why == "not onnx fp32: it was held to torch on cpu, and would run on cuda"
    with pytest.raises(EngineError, match="held to torch on cpu, and would run on cuda") as failure:
        choose(publish({ONNX: ("cpu", 1.0)}), (ONNX,), anything)
    assert failure.value.remedy == "diffrc export --device cuda does it there"
    assert choose(publish({ONNX: ("cpu", 1.0)}), (ONNX,), anything, device="cpu").why == ""


def test_an_engine_is_gated_and_loaded_on_the_gpu_and_its_card_says_which(exported: Any, on: Callable[..., Any], tmp_path: Path) -> None:
    gpu = on()
    card = export_onnx(
        exported.unet, exported.schedule, tmp_path / "target.onnx", exported.settings, data=exported.path.read_bytes(), device=GPU
    )
    assert (card.device, card.tolerance) == (H200, exported.settings.gpu_one_step_tolerance)
    assert {1, 2, 8} <= set(gpu.runs)
    engine = load(read(tmp_path / "target.onnx", ONNX), "target.onnx", device=GPU)
    before = len(gpu.runs)
    engine(*example_input(card, 3, 0))
    assert gpu.runs[before:] == [3]


# --------------------------------------------------------------------------------- on a real one: pytest tests/backends -k gpu


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
def test_gpu_exports_pass_their_gate_where_they_will_run(exported: Any, tmp_path: Path) -> None:
    try:
        device = device_of(ONNX, "cuda")
    except EngineError as error:
        pytest.skip(error.problem)
    path = tmp_path / "target.onnx"
    card = export_onnx(exported.unet, exported.schedule, path, exported.settings, data=exported.path.read_bytes(), device=device)
    assert card.device == torch.cuda.get_device_name()
    assert card.one_step_error <= exported.settings.gpu_one_step_tolerance
    assert choose(path, (ONNX,), anything).why == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
def test_gpu_convolutions_and_products_are_float32s_within() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(8, 64, 16, 16, device=GPU), torch.randn(64, 64, 3, 3, device=GPU)
    exact = torch.nn.functional.conv2d(x.double(), weight.double())
    with exact_float32(GPU):
        error = (torch.nn.functional.conv2d(x, weight) - exact).norm() / exact.norm()
    assert float(error) < 1e-5
