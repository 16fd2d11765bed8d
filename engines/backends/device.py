"""Where networks run: the device asked for, exact float32 on it, a stream of it for runtimes that torch knows nothing of; processors."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from engines.errors import EngineError, UsageError, first_line

CPU = torch.device("cpu")
TF32 = False  # in every runtime: its 10 bits of mantissa are no float32, and parity limits for float32 would not hold

_tf32_turn = threading.RLock()


def choose_device(name: str) -> torch.device:
    """The device asked for, or nothing: only "auto" chooses. Raises UsageError for an unknown name, EngineError where it is missing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"there is no device named {name!r}", "--device auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EngineError(
            f"torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices, not {name}",
            "--device cpu, or install a CUDA build of torch",
        )
    return device


def device_name(device: torch.device) -> str:
    """What a card calls it: "cpu", or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def processors() -> int:
    """How many this process may use: not all that there are, where the system tells them apart."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Torch on one thread while batches run side by side: their speed adds up, and no sum depends on a thread count.

    Threads that are started meanwhile say so themselves (`torch.set_num_threads` as initializer): OpenMP keeps the number by thread.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Torch's float32 products and convolutions in float32 on a GPU: left alone, cuDNN rounds what it multiplies to TF32.

    The switches are the process's, so threads that use it run in turn; on a CPU it does nothing.
    """
    if device.type != "cuda":
        yield
        return
    with _tf32_turn:
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        _set_tf32(TF32, TF32)
        try:
            yield
        finally:
            _set_tf32(*before)


def _set_tf32(matmul: bool, convolution: bool) -> None:
    with warnings.catch_warnings():  # some versions of torch name a newer way, which the oldest one that we run with has not
        warnings.filterwarnings("ignore", message=".*TF32")
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution


class OutOfMemory(EngineError):
    """A GPU with too little memory left for a batch."""


@contextlib.contextmanager
def gpu_failures() -> Iterator[None]:
    """What a GPU fails with, torch's or another runtime's, as errors that say what to do. Raises OutOfMemory, EngineError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(error) from error
    except RuntimeError as error:  # of the CUDA runtime, which has no classes
        if "CUDA" not in str(error):
            raise
        if any(words in str(error).lower() for words in ("out of memory", "failed to allocate memory")):
            raise _out_of_memory(error) from error
        raise EngineError(f"the GPU failed: {first_line(error)}", "nvidia-smi shows its state; then the same command continues") from error


def _out_of_memory(error: Exception) -> OutOfMemory:
    return OutOfMemory(f"the GPU has too little memory left: {first_line(error)}", "free the GPU, or a smaller synth.batch_size")


class Stream(Protocol):
    """What a runtime beside torch needs of a GPU. `CudaStream` is the real one; that of the tests keeps its rules on a CPU."""

    @property
    def index(self) -> int:
        """Which GPU."""
        ...

    @property
    def handle(self) -> int:
        """The CUDA stream, never the default one."""
        ...

    def place(self, value: Tensor) -> Tensor:
        """The tensor, or a copy of it, contiguous on the GPU."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of the GPU that lives as long as the tensor. Raises torch.OutOfMemoryError."""
        ...

    def ordered(self) -> AbstractContextManager[None]:
        """The stream runs after what the caller has queued so far, and what the caller queues next after the stream.

        Memory that the caller allocated may therefore be given back right after it.
        """
        ...


class CudaStream:
    """See `Stream`. Raises EngineError where torch finds no GPU."""

    def __init__(self, device: torch.device | None = None) -> None:
        device = device or torch.device("cuda")
        if not torch.cuda.is_available():
            raise EngineError(f"torch {torch.__version__} finds no NVIDIA GPU", "--device cpu, or install a CUDA build of torch")
        self._device = torch.empty(0, device=device).device  # with the index of the current one, where none was named
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    @property
    def index(self) -> int:
        """See `Stream.index`."""
        return int(self._device.index)

    @property
    def handle(self) -> int:
        """See `Stream.handle`."""
        return int(self._stream.cuda_stream)

    def place(self, value: Tensor) -> Tensor:
        """See `Stream.place`."""
        return value.detach().to(self._device).contiguous()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See `Stream.empty`."""
        return torch.empty(shape, dtype=dtype, device=self._device)

    @contextlib.contextmanager
    def ordered(self) -> Iterator[None]:
        """See `Stream.ordered`."""
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        try:
            yield
        finally:
            caller.wait_stream(self._stream)
