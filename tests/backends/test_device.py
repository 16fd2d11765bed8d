"""The device asked for, or an error; TF32 off while it matters, and as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engines.backends.device import CPU, CudaStream, choose_device, device_name, exact_float32
from engines.errors import EngineError, UsageError

GPU = torch.device("cuda")


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
