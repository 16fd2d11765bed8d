"""OpenVINO: an exported network compiled for this CPU, a static shape a batch size, in the precision that was asked for, or nothing."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.backends.base import EngineCard, EngineFile, Precision, check_input, read_engine, self_test
from engines.backends.device import processors
from engines.backends.ort_engine import OUTPUT, check_model
from engines.backends.runtimes import import_openvino
from engines.errors import EngineError

HINTS = {"fp32": "f32", "bf16": "bf16"}  # by a card's precision
MAX_OPSET = 20  # compiling a network exported at 21 or 23 ends the whole process in OpenVINO 2026.4: there is no error to catch


class OpenVinoEngine:
    """See `Engine`. Threads may call it side by side, see `StaticModel`.

    The file is the ONNX file that ONNX Runtime reads as well, with a card of its own: one copy of the weights, one hash, and a
    compiled model is of this machine alone.

    Args:
        file: an engine file that matches its card; the card's precision is what it runs in.
        origin: what it is called in messages.
        threads: of one evaluation; 0 = all that this process may use.
        streams: evaluations that run at once; 0 = as many as this process may use processors. 1 where `threads` is 0.
        batch: the batch size that will be asked for: it is compiled first, and what the load-time test runs; 0 = that test's own.

    Raises:
        DataError: the file is not an ONNX model of the kind that `diffrc export` makes; OpenVINO does not see it then.
        EngineError: OpenVINO is not here, this CPU has not the precision, the opset is above MAX_OPSET, or it cannot be compiled.
        ParityError: its numbers are not those of the card.
    """

    def __init__(self, file: EngineFile, origin: str, threads: int = 0, streams: int = 0, batch: int = 0) -> None:
        self._card = file.card
        if file.card.opset > MAX_OPSET:
            raise EngineError(
                f"OpenVINO takes opsets up to {MAX_OPSET} here; {origin} has {file.card.opset}", f"diffrc export --opset {MAX_OPSET}"
            )
        check_model(file.data, file.card, origin)
        self._model = StaticModel(file.data, origin, file.card.precision, threads, streams)
        self_test(self, origin, batch)

    @classmethod
    def load(cls, path: Path, precision: Precision = "fp32", threads: int = 0, streams: int = 0, batch: int = 0) -> OpenVinoEngine:
        """The engine of an ONNX file with a card for OpenVINO beside it. Raises EngineError where they do not belong together."""
        return cls(read_engine(path, "openvino", precision), str(path), threads, streams, batch)

    @property
    def card(self) -> EngineCard:
        """What it is."""
        return self._card

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """See `Engine.__call__`."""
        check_input(self._card, x, t, y)
        (out,) = self._model({"x": x, "t": t} | ({} if y is None else {"y": y}), [OUTPUT])
        return out


class StaticModel:
    """An ONNX model on this CPU in static shapes, which is what OpenVINO is fast with, and right.

    Each batch size that is asked for is compiled once, in about the time of a few evaluations. Threads may call it side by
    side: each has infer requests of its own, and up to `streams` of them run at once.

    Args:
        data: of a checked ONNX file.
        origin: what it is called in messages.
        threads, streams: as of `OpenVinoEngine`.

    Raises EngineError, here or at the first call of a batch size.
    """

    def __init__(self, data: bytes, origin: str, precision: Precision, threads: int = 0, streams: int = 0) -> None:
        self._origin, self._hint = origin, HINTS.get(precision, "")
        self._streams = (streams or processors()) if threads else 1
        self._threads = self._streams * threads or processors()
        check_operators(data, origin)
        require_runtime(precision)
        self._core = _core()
        self._model = self._read(data)
        self.compiled: dict[int, Any] = {}  # by batch size
        self._compiling = threading.Lock()
        self._own = threading.local()

    def __call__(self, feed: Mapping[str, Tensor], outputs: Sequence[str]) -> tuple[Tensor, ...]:
        """Inputs by name, all of one batch -> those outputs, copies on the device of the first input."""
        first = next(iter(feed.values()))
        arrays = {name: value.detach().cpu().contiguous().numpy() for name, value in feed.items()}
        request = self._request(arrays)
        results = request.infer(arrays, share_inputs=True, share_outputs=False)  # copies: the request keeps its own buffers
        return tuple(torch.from_numpy(results[name]).to(first.device) for name in outputs)

    def _request(self, arrays: Mapping[str, Any]) -> Any:
        """This thread's request for a batch size."""
        batch = len(next(iter(arrays.values())))
        own: dict[int, Any] = self._own.__dict__.setdefault("requests", {})
        if batch not in own:
            with self._compiling:
                if batch not in self.compiled:
                    self.compiled[batch] = self._compile(arrays)
            own[batch] = self.compiled[batch].create_infer_request()
        return own[batch]

    def _read(self, data: bytes) -> Any:
        try:
            return self._core.read_model(data, b"")
        except RuntimeError as error:
            raise self._refused("read", error) from error

    def _compile(self, arrays: Mapping[str, Any]) -> Any:
        model = self._model.clone()
        settings = {
            "INFERENCE_PRECISION_HINT": self._hint,  # left alone, OpenVINO takes bf16 wherever the CPU has it
            "NUM_STREAMS": self._streams,
            "INFERENCE_NUM_THREADS": self._threads,
            "ENABLE_CPU_PINNING": False,  # two processes would pin their threads to the same processors
        }
        try:
            model.reshape({name: list(value.shape) for name, value in arrays.items()})
            compiled = self._core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise self._refused("compile", error) from error
        runs = _name(compiled.get_property("INFERENCE_PRECISION_HINT"))
        if runs != self._hint:
            problem = f"{self._origin} would run in {runs}, not in {self._hint}"
            raise EngineError(problem, "diffrc export --engine onnx; or --engine torch")
        return compiled

    def _refused(self, verb: str, error: RuntimeError) -> EngineError:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1] if lines else "no reason given"
        return EngineError(f"OpenVINO cannot {verb} {self._origin}: {reason}", "--engine onnx runs without it")


def check_operators(data: bytes, origin: str) -> None:
    """Refuse a model that OpenVINO would not survive: compiling GroupNormalization, which exports from opset 21 on hold, ends the process.

    (OpenVINO 2026.4 on a CPU, float32, static shapes: a segmentation fault in compile_model.) Raises EngineError.
    """
    import onnx

    if any(node.op_type == "GroupNormalization" for node in onnx.load_model_from_string(data).graph.node):
        problem = f"{origin} has an operator that OpenVINO crashes on: GroupNormalization, of opset 21 and later"
        raise EngineError(problem, "diffrc export --set export.opset=20; or --engine onnx")


def require_runtime(precision: Precision = "fp32") -> Any:
    """The openvino module. Ask before long work. Raises EngineError where it is missing, or where this CPU lacks the precision."""
    try:
        openvino = import_openvino()
    except ImportError as error:
        raise EngineError(f"OpenVINO cannot be imported: {error}", 'pip install "diffrc[openvino]"') from None
    core = _core()
    if "CPU" not in core.available_devices:
        raise EngineError("this OpenVINO has no CPU device", 'pip install "diffrc[openvino]"')
    have = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision == "bf16" and "BF16" not in have:
        raise EngineError(f"this CPU has no bf16 in OpenVINO, only {', '.join(sorted(have))}", "--precision fp32 runs here")
    if precision not in HINTS:
        raise EngineError(f"OpenVINO does not run {precision} on a CPU here", "--precision fp32, or bf16 where the CPU has it")
    return openvino


@functools.cache
def _core() -> Any:
    """The one core of this process, never given up: OpenVINO 2026.4 lets signal handlers run on memory of a core's own, and a thread
    in which cores came and went is left with that of one that is gone; its next signal, a Ctrl-C say, would end the process.
    """
    return import_openvino().Core()


def _name(element_type: Any) -> str:
    """ "f32" or "bf16" of openvino.Type, which writes itself as <Type: 'float32'>."""
    return str(element_type.get_type_name())
