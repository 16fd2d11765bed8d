"""Each probe really opens its library, and says of a broken one what is wrong and what to do."""

from __future__ import annotations

import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.errors import EngineError
from engines.health import probes
from engines.health.findings import SEVERITIES, Finding, from_json, worst
from engines.health.probes import Probed

BACKENDS = Path(__file__).parent.parent / "backends"


def fake_onnxruntime() -> Any:
    """tests/backends/fake_onnxruntime.py: test folders are no packages."""
    spec = importlib.util.spec_from_file_location("fake_onnxruntime_of_health", BACKENDS / "fake_onnxruntime.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def found_by(probe: Callable[..., None], **arguments: Any) -> list[Finding]:
    probed = Probed()
    probe(probed, **arguments)
    assert all((found.remedy == "") == (found.severity == "ok") for found in probed.findings), "one remedy a finding"
    return probed.findings


def test_what_is_installed_here_runs() -> None:
    for probe in (probes.probe_packages, probes.probe_torch):
        assert {found.severity for found in found_by(probe)} <= {"ok"} or probes.has_gpu()
    [found] = found_by(probes.probe_onnxruntime, gpu_here=False)[:1]
    assert (found.severity, found.text.endswith("runs on CPUExecutionProvider")) == ("ok", True)
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    [found] = found_by(probes.probe_openvino)
    assert (found.check, found.severity) == ("openvino", "ok")


# ---------------------------------------------------------------------------------------------------------- ONNX Runtime


@pytest.mark.parametrize(("gpu_here", "grave"), [(True, "error"), (False, "warning")], ids=["with a GPU", "without"])
def test_a_cuda_provider_whose_library_is_missing_names_it(
    gpu_here: bool, grave: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = fake_onnxruntime()
    module = fake.module(fake.Gpu(starts=()))
    module.__file__ = str(tmp_path / "__init__.py")  # where the providers' libraries are looked for
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    cpu, cuda, tensorrt = found_by(probes.probe_onnxruntime, gpu_here=gpu_here)
    assert (cpu.severity, cuda.severity, tensorrt.severity) == ("ok", grave, "note")
    assert "CUDAExecutionProvider" in cuda.text
    assert "libonnxruntime_providers_cuda.so" in cuda.text
    assert ("CUDA 13.0 and cuDNN 9" if gpu_here else "pip uninstall onnxruntime-gpu") in cuda.remedy


def test_a_cuda_provider_that_starts_is_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_onnxruntime()
    monkeypatch.setitem(sys.modules, "onnxruntime", fake.module(fake.Gpu()))
    texts = [found.text for found in found_by(probes.probe_onnxruntime, gpu_here=True) if found.severity == "ok"]
    assert texts[1:] == ["runs on CUDAExecutionProvider", "runs on TensorrtExecutionProvider"]


def test_a_build_without_cuda_beside_a_gpu_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_onnxruntime()
    monkeypatch.setitem(sys.modules, "onnxruntime", fake.module(fake.Gpu(), listed=(fake.CPU,)))
    _, found = found_by(probes.probe_onnxruntime, gpu_here=True)
    assert (found.severity, "diffrc[gpu]" in found.remedy) == ("warning", True)
    assert len(found_by(probes.probe_onnxruntime, gpu_here=False)) == 1


def test_a_runtime_that_is_missing_or_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    [found] = found_by(probes.probe_onnxruntime, gpu_here=False)
    assert (found.severity, "diffrc[cpu]" in found.remedy) == ("error", True)
    broken = types.ModuleType("onnxruntime")
    broken.__dict__.update(get_available_providers=lambda: ["CPUExecutionProvider"], SessionOptions=object)
    monkeypatch.setitem(sys.modules, "onnxruntime", broken)
    [found] = found_by(probes.probe_onnxruntime, gpu_here=False)
    assert (found.severity, "CPUExecutionProvider" in found.text) == ("error", True)


# ----------------------------------------------------------------------------------------------------------------- torch


def fake_torch(says: str = "", cuda: str | None = None, from_numpy: Callable[[Any], Any] | None = None) -> types.ModuleType:
    import torch

    def is_available() -> bool:
        if says:
            warnings.warn(says, UserWarning, stacklevel=2)
        return False

    module = types.ModuleType("torch")
    module.__dict__.update(
        __version__="2.9.9",
        from_numpy=from_numpy or torch.from_numpy,
        ones=torch.ones,
        get_num_threads=lambda: 3,
        version=types.SimpleNamespace(cuda=cuda),
        cuda=types.SimpleNamespace(is_available=is_available, device_count=lambda: 0),
    )
    return module


def test_a_driver_too_old_for_torch_is_told_in_torchs_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", fake_torch("The NVIDIA driver on your system is too old (found version 11040).", "12.8"))
    ok, found = found_by(probes.probe_torch)
    assert (ok.severity, ok.text) == ("ok", "2.9.9 computes on the CPU with 3 threads")
    assert (found.severity, "CUDA 12.8" in found.text, "too old (found version 11040)" in found.text) == ("warning", True, True)


def test_numpy_of_another_kind_than_torch_was_built_for_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_numpy(_: Any) -> None:
        raise RuntimeError("Numpy is not available")

    monkeypatch.setitem(sys.modules, "torch", fake_torch(from_numpy=from_numpy))
    [found] = found_by(probes.probe_torch)
    assert (found.check, found.severity) == ("numpy", "error")
    assert found.remedy == "pip install --force-reinstall torch numpy, so that both are of one kind"


def test_torch_that_cannot_be_imported_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    [found] = found_by(probes.probe_torch)
    assert (found.severity, found.text.startswith("cannot be imported: ")) == ("error", True)


# ----------------------------------------------------------------------------------------------------------------- others


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(probes, "PRESENT", {"scikit-learn": "no_such_module_here"})
    assert [(found.check, found.severity) for found in found_by(probes.probe_packages)] == [("pyarrow", "error"), ("scikit-learn", "error")]


def test_what_is_not_installed_and_not_needed_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    [openvino] = found_by(probes.probe_openvino)
    [without] = found_by(probes.probe_tensorrt, gpu_here=False)
    [with_gpu] = found_by(probes.probe_tensorrt, gpu_here=True)
    assert {found.severity for found in (openvino, without, with_gpu)} == {"note"}
    assert "diffrc[tensorrt]" in with_gpu.remedy


def test_an_openvino_that_does_not_load_is_a_warning_since_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from engines.backends import runtimes

    def fails() -> None:
        raise ImportError("libopenvino.so.2640: cannot open shared object file")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(runtimes, "import_openvino", fails)
    [found] = found_by(probes.probe_openvino)
    assert (found.severity, "libopenvino.so.2640" in found.text) == ("warning", True)


def test_a_tensorrt_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from engines.backends import trt_engine

    def fails() -> None:
        raise EngineError("TensorRT cannot be imported: libnvinfer.so.10 is missing", "install it")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(trt_engine, "require_tensorrt", fails)
    for gpu_here, grave in ((True, "warning"), (False, "note")):
        [found] = found_by(probes.probe_tensorrt, gpu_here=gpu_here)
        assert (found.severity, "libnvinfer.so.10" in found.text, found.remedy) == (grave, True, "install it")


def test_a_driver_that_cannot_be_asked_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(probes.ctypes, "CDLL", missing)
    for gpu_here, grave in ((True, "warning"), (False, "note")):
        monkeypatch.setattr(probes, "has_gpu", lambda here=gpu_here: here)
        [found] = found_by(probes.probe_driver)
        assert (found.check, found.severity) == ("driver", grave)


def test_the_gravest_finding_counts_and_only_findings_are_read() -> None:
    findings = [Finding("a", severity, "text") for severity in SEVERITIES]
    assert [worst(findings[: n + 1]) for n in range(4)] == ["ok", "note", "warning", "error"]
    assert worst([]) == "ok"
    assert from_json(["a", "note", "text", "try"]) == Finding("a", "note", "text", "try")
    for wrong in ([], ["a", "grave", "text", ""], ["a", "ok", 1, ""], "aoke", None):
        with pytest.raises(ValueError, match="no finding"):
            from_json(wrong)
