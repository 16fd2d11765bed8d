"""ONNX Runtime: an exported network on the provider that was asked for, the CPU's or a GPU's, or nothing.

On a GPU nothing passes through the CPU: a session reads and writes torch's memory, on a stream that is ordered with torch's.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from engines.backends.base import EngineCard, EngineFile, check_input, read_engine, self_test, unreadable
from engines.backends.device import TF32, CudaStream, Stream, gpu_failures, processors
from engines.backends.runtimes import one_node_model, onnxruntime_wheels
from engines.errors import EngineError, first_line

Provider = Literal["CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"]
CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"
TENSORRT: Final = "TensorrtExecutionProvider"
LIBRARIES = {CUDA: "libonnxruntime_providers_cuda.so", TENSORRT: "libonnxruntime_providers_tensorrt.so"}
CHECKED_OPTIONS = ("use_tf32", "cudnn_conv_algo_search")  # they change the numbers: a session that tells others is refused
OUTPUT = "out"


class OrtEngine:
    """See `Engine`. Threads may call it side by side; on a GPU they run in turn, on one stream.

    Args:
        file: an engine file that matches its card.
        origin: what it is called in messages.
        threads: of one evaluation on a CPU; 0 = all that this process may use.
        provider: where it runs; anything else is an error, never a fallback.
        stream: of the GPU that it runs on; default one of the current GPU. None on a CPU.
        batch: the batch size that will be asked for, which is what the load-time test runs; 0 = that test's own.

    Raises:
        DataError: the file is not an ONNX model of the kind that `diffrc export` makes; no session is made then.
        EngineError: no such provider here, or the model cannot be loaded.
        ParityError: its numbers are not those of the card.
    """

    def __init__(
        self, file: EngineFile, origin: str, threads: int = 0, provider: Provider = CPU, stream: Stream | None = None, batch: int = 0
    ) -> None:
        self._card = file.card
        check_model(file.data, file.card, origin)
        if provider != CPU:
            require_runtime(provider)  # first: a stream tells less about what is missing
        self._stream = None if provider == CPU else stream or CudaStream()
        self._turn = threading.Lock()
        self._session = session(file.data, origin, threads, provider, self._stream)
        self_test(self, origin, batch)

    @classmethod
    def load(cls, path: Path, threads: int = 0, provider: Provider = CPU, stream: Stream | None = None) -> OrtEngine:
        """The engine of a file with a card beside it. Raises EngineError where they do not belong together, and as above."""
        return cls(read_engine(path), str(path), threads, provider, stream)

    @property
    def card(self) -> EngineCard:
        """What it is."""
        return self._card

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """See `Engine.__call__`."""
        check_input(self._card, x, t, y)
        feed = {"x": x, "t": t} | ({} if y is None else {"y": y})
        if self._stream is not None:
            shape = (len(x), self._card.out_channels, *x.shape[2:])
            with self._turn:
                (result,) = run_on_gpu(self._session, self._stream, feed, {OUTPUT: shape})
            return result.to(x.device)
        (out,) = self._session.run([OUTPUT], {name: value.detach().cpu().contiguous().numpy() for name, value in feed.items()})
        return torch.from_numpy(out).to(x.device)  # a session gives each run an array of its own


def input_names(card: EngineCard) -> list[str]:
    """The graph's inputs, in order."""
    return ["x", "t", "y"] if card.classes else ["x", "t"]


def check_model(data: bytes, card: EngineCard, origin: str) -> None:
    """Refuse a network before any runtime sees it, see `check_graph`. Raises DataError."""
    check_graph(data, card.opset, input_names(card), [OUTPUT], origin)


def check_graph(data: bytes, opset: int, inputs: list[str], outputs: list[str], origin: str) -> None:
    """Refuse a model before any runtime sees it: external data, custom operators, another opset, or other inputs and outputs.

    Raises DataError.
    """
    import onnx

    try:
        model = onnx.load_model_from_string(data)
    except Exception:  # protobuf's DecodeError; protobuf ships no types
        raise unreadable(origin, "it is not an ONNX model") from None
    domains = {entry.domain: entry.version for entry in model.opset_import}
    if set(domains) - {"", "ai.onnx"} or model.functions:
        raise unreadable(origin, f"it uses operators of its own ({', '.join(sorted(set(domains) - {''})) or 'local functions'})")
    if domains.get("", domains.get("ai.onnx")) != opset:
        raise unreadable(origin, f"its opset is {domains}, its card says {opset}")
    for graph in _graphs(model.graph):
        if any(node.domain not in ("", "ai.onnx") for node in graph.node):
            raise unreadable(origin, "it uses operators of its own")
        if any(tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data for tensor in _tensors(graph)):
            raise unreadable(origin, "it keeps weights in other files")
    weights = {tensor.name for tensor in model.graph.initializer}
    found = [value.name for value in model.graph.input if value.name not in weights], [value.name for value in model.graph.output]
    if found != (inputs, outputs):
        raise unreadable(origin, f"its inputs and outputs are {found[0]} and {found[1]}")


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and every graph inside its nodes (branches, loop bodies)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.initializer:
                    yield from _graphs(inner)


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)


def require_runtime(provider: Provider = CPU) -> Any:
    """The onnxruntime module. Ask before long work that ends in an export.

    Raises EngineError where it or the provider is missing, where two of its wheels are installed, or where a GPU's provider is listed
    but cannot start: its library is loaded with the first session, and what it lacks is named.
    """
    if len(wheels := onnxruntime_wheels()) > 1:
        raise EngineError(
            f"{' and '.join(wheels)} are installed side by side: they are one module, and hide each other",
            f'pip uninstall {" ".join(wheels)}, then pip install "diffrc[cpu]" or "diffrc[gpu]"',
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(f"ONNX Runtime cannot be imported: {error}", 'pip install "diffrc[cpu]"') from None
    if provider not in onnxruntime.get_available_providers():
        have = ", ".join(onnxruntime.get_available_providers())
        extra = "cpu" if provider == CPU else "gpu"
        raise EngineError(
            f"this ONNX Runtime has no {provider}, only {have}", f'pip install "diffrc[{extra}]", and no other onnxruntime beside it'
        )
    if provider != CPU:
        _preload(onnxruntime)
        _start(onnxruntime, one_node_model(), "a model of one addition", provider, onnxruntime.SessionOptions(), [(provider, {})])
    return onnxruntime


def session(data: bytes, origin: str, threads: int = 0, provider: Provider = CPU, stream: Stream | None = None) -> Any:
    """An onnxruntime.InferenceSession on that provider, or EngineError; `threads` 0 = all that this process may use.

    Args:
        stream: of the GPU that it runs on, where the provider is one of a GPU.
    """
    onnxruntime = require_runtime(provider)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or processors()
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 3  # errors
    # The guide's gradient runs in torch between two evaluations; threads that spin while they wait would take its processors.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return _start(onnxruntime, data, origin, provider, options, _providers(provider, stream))


def run_on_gpu(session: Any, stream: Stream, feed: Mapping[str, Tensor], outputs: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
    """Run a session of a GPU without a copy through the CPU: it reads torch's memory and writes float32 into memory of torch's.

    Args:
        feed: inputs by name, float32 or int64, on any device.
        outputs: shapes by name.

    Returns: the outputs on the GPU, each the caller's own.

    Raises: OutOfMemory, EngineError where the GPU fails.
    """
    import numpy as np

    with gpu_failures():
        inputs = {name: stream.place(value) for name, value in feed.items()}  # kept until the run is over: a binding holds addresses
        results = {name: stream.empty(shape, torch.float32) for name, shape in outputs.items()}
        binding = session.io_binding()
        types = {torch.float32: np.float32, torch.int64: np.int64}
        for name, value in inputs.items():
            binding.bind_input(name, "cuda", stream.index, types[value.dtype], tuple(value.shape), value.data_ptr())
        for name, value in results.items():
            binding.bind_output(name, "cuda", stream.index, np.float32, tuple(value.shape), value.data_ptr())
        with stream.ordered():
            try:
                session.run_with_iobinding(binding)
            except Exception as error:  # the runtime raises classes of its own, which share no base
                raise RuntimeError(f"CUDA, in ONNX Runtime: {error}") from error
    return list(results.values())


def _providers(provider: Provider, stream: Stream | None) -> list[Any]:
    """What a session is asked for, with its options. What a GPU's provider cannot run itself goes to the next of the list."""
    if provider == CPU:
        return [provider]
    assert stream is not None, "a GPU's session runs on a stream that is ordered with torch's"
    device = {"device_id": str(stream.index), "user_compute_stream": str(stream.handle)}
    # HEURISTIC: an exhaustive search times the kernels at each start, so that one more start could round images differently.
    cuda = device | {"use_tf32": str(int(TF32)), "cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}
    # No `enable_cuda_graph`: a graph replays fixed addresses, and every call here has memory of its own.
    return [(CUDA, cuda)] if provider == CUDA else [(TENSORRT, device), (CUDA, cuda)]


def _start(onnxruntime: Any, data: bytes, origin: str, provider: Provider, options: Any, providers: list[Any]) -> Any:
    """A session that runs where it was asked to, or EngineError with what kept it from there."""
    silent = {} if provider == CPU else {"enable_fallback": 0}  # by itself it prints what failed and goes on, on the CPU
    try:
        with _quiet(onnxruntime) if silent else contextlib.nullcontext():
            made = onnxruntime.InferenceSession(data, options, providers=providers, **silent)
    except Exception as error:  # the runtime raises classes of its own, which share no base
        reason = first_line(error)
        if provider == CPU:
            raise EngineError(f"ONNX Runtime cannot load {origin}: {reason}", "diffrc export makes it anew") from error
        reason = _missing_library(onnxruntime, provider) or reason
        raise EngineError(f"ONNX Runtime cannot run {origin} on {provider}: {reason}", _remedy(onnxruntime, provider)) from error
    if made.get_providers()[0] != provider:  # a provider that cannot start is replaced silently
        missing = _missing_library(onnxruntime, provider)
        problem = f"{origin} runs on {made.get_providers()[0]}, not on {provider}" + (f": {missing}" if missing else "")
        raise EngineError(problem, _remedy(onnxruntime, provider))
    asked = {name: settings for name, settings in providers if settings} if silent else {}
    for name, settings in asked.items():
        taken = made.get_provider_options().get(name, {})
        if other := [key for key, value in settings.items() if key in CHECKED_OPTIONS and taken.get(key, value) != value]:
            raise EngineError(f"{name} runs {origin} with another {other[0]} than it was asked for", "--engine torch runs without it")
    return made


def _preload(onnxruntime: Any) -> None:
    """Load CUDA and cuDNN of the Python packages that hold them, where no library path names them (ONNX Runtime 1.21 and later)."""
    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find; what is missed is told below
            onnxruntime.preload_dlls()


@contextlib.contextmanager
def _quiet(onnxruntime: Any) -> Iterator[None]:
    """The runtime's own log, which tells of a missing library in five lines of colors, is off: the error tells it in one."""
    onnxruntime.set_default_logger_severity(4)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(2)  # its default: warnings


def _missing_library(onnxruntime: Any, provider: Provider) -> str:
    """The loader's words on why a provider's library does not load, "" where it does.

    To be asked only after the runtime tried itself: loaded before that, the library would miss what the runtime gives it.
    """
    if provider == CPU or not getattr(onnxruntime, "__file__", None):
        return ""
    library = Path(onnxruntime.__file__).parent / "capi" / LIBRARIES[provider]
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return str(error)
    return ""


def _remedy(onnxruntime: Any, provider: Provider) -> str:
    if provider == TENSORRT:
        return "install TensorRT 10, whose libnvinfer.so.10 it loads; --engine onnx --device cuda runs without it"
    needed = f"CUDA {version} and cuDNN 9" if (version := getattr(onnxruntime, "cuda_version", "")) else "CUDA and cuDNN 9"
    return f'it needs {needed}: pip install "onnxruntime-gpu[cuda,cudnn]"; or --device cpu, or --engine torch'
