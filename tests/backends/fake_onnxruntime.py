"""ONNX Runtime with a GPU, made of this CPU: it computes with the real one and holds callers to the rules of I/O binding.

What breaks a rule that the runtime would not notice (memory that was freed, a run that is not ordered with torch's stream) fails an
assertion here; a provider that cannot start is replaced in silence, as the runtime does.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
INDEX = 1  # not the first GPU: an index that is left out shows
HANDLE = 0x5151
TF32_ERROR = 1e-3
DEFAULTS = {"use_tf32": "1", "cudnn_conv_algo_search": "EXHAUSTIVE"}


class Gpu:
    """The GPU, its memory and the one stream that is used; see `engines.backends.device.Stream`.

    Args:
        starts: which of the listed providers start; the others are replaced by what comes next in a session's list.
        forgets: options that sessions take no notice of.
    """

    def __init__(self, starts: Sequence[str] = (CUDA, TENSORRT), forgets: Sequence[str] = ()) -> None:
        self.starts, self.forgets = starts, forgets
        self.index, self.handle = INDEX, HANDLE
        self.runs: list[int] = []  # batches
        self.fails_with: Exception | None = None
        self._memory: list[weakref.ref[Tensor]] = []
        self._raw: list[Tensor] = []  # never given back: an address is never another tensor's later
        self._queue: list[Callable[[], object]] = []
        self.inside = 0

    def place(self, value: Tensor) -> Tensor:
        """Always a copy: whoever keeps only its address loses it."""
        block = self.empty(tuple(value.shape), value.dtype)
        block.copy_(value)
        return block

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Full of what nobody may read."""
        raw = torch.empty(shape, dtype=dtype).fill_(float("nan") if dtype.is_floating_point else 99)
        self._raw.append(raw)
        block = raw.view(shape)
        self._memory.append(weakref.ref(block))
        return block

    @contextlib.contextmanager
    def ordered(self) -> Iterator[None]:
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1
        work, self._queue = self._queue, []
        for item in work:  # the latest moment at which a GPU may run it; before it, results are not there
            item()

    def launch(self, item: Callable[[], object]) -> None:
        assert self.inside, "a run that is not ordered with torch's stream"
        self._queue.append(item)

    def at(self, address: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The living memory at an address, which must be exactly what it is said to be."""
        living = [block for block in (reference() for reference in self._memory) if block is not None]
        found = [block for block in living if block.data_ptr() == address]
        assert found, f"{address:#x} is not the address of living memory of the GPU"
        assert found[-1].is_contiguous()
        assert (tuple(found[-1].shape), found[-1].dtype) == (tuple(shape), dtype), f"{found[-1].shape} {found[-1].dtype} in memory"
        return found[-1]


class InferenceSession:
    def __init__(
        self, gpu: Gpu, data: bytes, options: Any, providers: Sequence[str | tuple[str, dict[str, str]]], enable_fallback: int = 1
    ) -> None:
        asked = {entry if isinstance(entry, str) else entry[0]: {} if isinstance(entry, str) else entry[1] for entry in providers}
        assert all(isinstance(value, str) for settings in asked.values() for value in settings.values()), "options are text"
        if TENSORRT in asked and TENSORRT not in gpu.starts:
            if not enable_fallback:
                raise RuntimeError("Please install TensorRT libraries as mentioned in the GPU requirements page")
            del asked[TENSORRT]
        self._gpu = gpu
        self._running = {name: settings for name, settings in asked.items() if name == CPU or name in gpu.starts}
        self._session = onnxruntime.InferenceSession(data, options, providers=[CPU])
        self._types = {value.name: value.type for value in self._session.get_inputs()}
        for settings in self._running.values():
            assert settings.get("user_compute_stream", str(HANDLE)) == str(HANDLE)
            assert settings.get("device_id", str(INDEX)) == str(INDEX)

    def get_providers(self) -> list[str]:
        return [*(name for name in self._running if name != CPU), CPU]

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        kept = {key: value for key, value in self._running.get(CUDA, {}).items() if key not in self._gpu.forgets}
        return {name: DEFAULTS | kept if name == CUDA else {} for name in self.get_providers()}

    def get_outputs(self) -> Any:
        return self._session.get_outputs()

    def run(self, names: Sequence[str], feed: dict[str, Any]) -> list[Any]:
        assert CUDA not in self._running, "every value would be copied to the GPU and back"
        return list(self._session.run(names, feed))

    def io_binding(self) -> IOBinding:
        return IOBinding()

    def run_with_iobinding(self, binding: IOBinding) -> None:
        gpu, session = self._gpu, self._session
        if gpu.fails_with:
            raise gpu.fails_with
        wanted, given = set(self._types), set(binding.inputs)
        assert wanted == given, f"the graph takes {wanted}, {given} are bound"
        assert {output.name for output in session.get_outputs()} == set(binding.outputs), "an output that is not bound is allocated anew"
        assert "user_compute_stream" in self._running[CUDA], "a stream of its own is not ordered with torch's"
        for name, (_, dtype, _) in binding.inputs.items():
            assert self._types[name] == {torch.float32: "tensor(float)", torch.int64: "tensor(int64)"}[dtype]

        def kernels() -> None:
            feed = {name: gpu.at(address, shape, dtype).clone().numpy() for name, (shape, dtype, address) in binding.inputs.items()}
            gpu.runs.append(len(next(iter(feed.values()))))
            for name, value in zip(binding.outputs, session.run(list(binding.outputs), feed), strict=True):
                if self.get_provider_options()[CUDA]["use_tf32"] != "0":
                    value = value * (1 + TF32_ERROR * np.sign(np.sin(np.arange(value.size).reshape(value.shape)))).astype(np.float32)
                shape, dtype, address = binding.outputs[name]
                gpu.at(address, shape, dtype).copy_(torch.from_numpy(value))

        gpu.launch(kernels)


Bound = tuple[tuple[int, ...], torch.dtype, int]


class IOBinding:
    def __init__(self) -> None:
        self.inputs: dict[str, Bound] = {}
        self.outputs: dict[str, Bound] = {}

    def bind_input(self, name: str, device_type: str, device_id: int, element_type: Any, shape: tuple[int, ...], buffer_ptr: int) -> None:
        assert (device_type, device_id) == ("cuda", INDEX)
        self.inputs[name] = (tuple(shape), _torch_type(element_type), buffer_ptr)

    def bind_output(self, name: str, device_type: str, device_id: int, element_type: Any, shape: tuple[int, ...], buffer_ptr: int) -> None:
        assert (device_type, device_id) == ("cuda", INDEX)
        self.outputs[name] = (tuple(shape), _torch_type(element_type), buffer_ptr)


def _torch_type(element_type: Any) -> torch.dtype:
    return {np.float32: torch.float32, np.int64: torch.int64}[element_type]


def module(gpu: Gpu, listed: Sequence[str] = (TENSORRT, CUDA, CPU)) -> ModuleType:
    """What `import onnxruntime` gives on a computer with this GPU."""
    made = ModuleType("onnxruntime")
    made.__dict__.update(
        SessionOptions=onnxruntime.SessionOptions,
        InferenceSession=lambda data, options, providers, **more: InferenceSession(gpu, data, options, providers, **more),
        get_available_providers=lambda: list(listed),
        set_default_logger_severity=onnxruntime.set_default_logger_severity,
        preload_dlls=lambda: print("Failed to load libcublas.so.13"),
        cuda_version="13.0",
    )
    return made
