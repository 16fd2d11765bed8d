"""An ONNX graph of any inputs and outputs on ONNX Runtime or OpenVINO, in float32: tensors by name in, tensors out."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from engines.backends import ort_engine
from engines.errors import EngineError

Runtime = Literal["onnx", "openvino"]

Graph = Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]
"""Inputs by name, all of one batch -> outputs in order, on the device of the first input; never views of a runtime's buffers."""


def open_graph(
    data: bytes, inputs: Sequence[str], outputs: Sequence[str], opset: int, origin: str, runtime: Runtime = "onnx", threads: int = 0
) -> Graph:
    """A graph ready to run.

    Args:
        origin: what it is called in messages.
        threads: of one evaluation; 0 = all that this process may use.

    Raises:
        DataError: it is not an ONNX model of these inputs and outputs in one piece of standard operators; no runtime sees it then.
        EngineError: the runtime is not here, or cannot load it.
    """
    ort_engine.check_graph(data, opset, list(inputs), list(outputs), origin)
    return _on_ort(data, outputs, origin, threads) if runtime == "onnx" else _on_openvino(data, outputs, origin, threads)


def _on_ort(data: bytes, outputs: Sequence[str], origin: str, threads: int) -> Graph:
    session = ort_engine.session(data, origin, threads)

    def run(feed: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        device = next(iter(feed.values())).device
        return tuple(torch.from_numpy(out).to(device) for out in session.run(list(outputs), _arrays(feed)))

    return run


def _on_openvino(data: bytes, outputs: Sequence[str], origin: str, threads: int) -> Graph:
    """Static shapes, compiled for each batch at its first call: in dynamic shapes OpenVINO's gradients were silently wrong."""
    from engines.backends.openvino_engine import check_operators, require_runtime

    check_operators(data, origin)
    core = require_runtime("fp32").Core()
    compiled: dict[int, Any] = {}
    turn = threading.Lock()  # of a request, whose buffers one call at a time may use
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads or len(os.sched_getaffinity(0))}

    def compile_for(feed: Mapping[str, Tensor]) -> Any:
        try:
            model = core.read_model(data, b"")
            model.reshape({name: list(value.shape) for name, value in feed.items()})
            return core.compile_model(model, "CPU", settings).create_infer_request()
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = lines[-1] if lines else "no reason given"
            raise EngineError(f"OpenVINO cannot compile {origin}: {reason}", "ONNX Runtime runs it: --engine onnx") from error

    def run(feed: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        first = next(iter(feed.values()))
        with turn:
            if len(first) not in compiled:
                compiled[len(first)] = compile_for(feed)
            results = compiled[len(first)].infer(_arrays(feed), share_outputs=False)
        return tuple(torch.from_numpy(results[name]).to(first.device) for name in outputs)

    return run


def _arrays(feed: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: value.detach().cpu().contiguous().numpy() for name, value in feed.items()}
