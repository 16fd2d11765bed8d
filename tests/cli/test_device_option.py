"""--device of export and synth: what is named is there or nothing runs, in seconds and with what is missing."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffrc_cli.app import main
from engines import store
from engines.backends import choice

Call = Callable[..., tuple[int, str]]
COMMANDS = [("export",), ("synth", "--class", "nine", "--n", "1", "--engine", "onnx")]


@pytest.fixture
def call(exported_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """call("synth", "--fill") -> exit code and stderr, in a folder whose latest run is trained and exported to ONNX Runtime."""
    shutil.copytree(exported_run, tmp_path / "runs" / "digits-lt")
    store.write_json(tmp_path / "runs" / "latest.json", {"run": "digits-lt"})
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert isinstance(end.value.code, int)
        return end.value.code, capsys.readouterr().err

    return run


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a GPU")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_gpu_that_torch_does_not_see_is_an_error(command: tuple[str, ...], call: Call) -> None:
    code, told = call(*command, "--device", "cuda")
    assert code == 4
    assert "sees 0 CUDA devices, not cuda" in told


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_runtime_that_lists_cuda_and_would_run_on_the_cpu_stops_with_what_it_lacks(
    command: tuple[str, ...], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(__file__).parent.with_name("backends") / "fake_onnxruntime.py"
    spec = importlib.util.spec_from_file_location("fake_onnxruntime", path)
    assert spec is not None and spec.loader is not None
    fake: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fake)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake.module(fake.Gpu(starts=())))
    monkeypatch.setattr(choice, "choose_device", torch.device)  # torch sees a GPU
    started = time.perf_counter()
    code, told = call(*command, "--device", "cuda")
    assert time.perf_counter() - started < 10
    assert code == 4
    problem, remedy = told.splitlines()[-2:]
    assert "runs on CPUExecutionProvider, not on CUDAExecutionProvider" in problem
    assert "CUDA 13.0 and cuDNN 9" in remedy
    assert not Path("runs/digits-lt/synth").exists()
