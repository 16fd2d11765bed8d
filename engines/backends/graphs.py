"""An ONNX graph of any inputs and outputs on ONNX Runtime or OpenVINO: tensors by name in, tensors out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from engines.backends import ort_engine
from engines.backends.base import Precision
from engines.errors import EngineError

Runtime = Literal["onnx", "openvino"]

Graph = Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]
"""Inputs by name, all of one batch -> outputs in order, on the device of the first input; never views of a runtime's buffers."""


def open_graph(
    data: bytes,
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int,
    origin: str,
    runtime: Runtime = "onnx",
    threads: int = 0,
    precision: Precision = "fp32",
) -> Graph:
    """A graph ready to run. Threads may call it side by side.

    Args:
        origin: what it is called in messages.
        threads: of one evaluation, of which as many may run at once as there are processors; 0 = all that this process may use.
        precision: what it computes in; bf16 in OpenVINO alone.

    Raises:
        DataError: it is not an ONNX model of these inputs and outputs in one piece of standard operators; no runtime sees it then.
        EngineError: the runtime is not here, has not the precision, or cannot load it.
    """
    ort_engine.check_graph(data, opset, list(inputs), list(outputs), origin)
    if runtime == "openvino":
        return _on_openvino(data, outputs, origin, threads, precision)
    if precision != "fp32":
        raise EngineError(f"ONNX Runtime does not run {origin} in {precision} on a CPU", "--engine openvino does, where the CPU can")
    return _on_ort(data, outputs, origin, threads)


def _on_ort(data: bytes, outputs: Sequence[str], origin: str, threads: int) -> Graph:
    session = ort_engine.session(data, origin, threads)

    def run(feed: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        device = next(iter(feed.values())).device
        return tuple(torch.from_numpy(out).to(device) for out in session.run(list(outputs), _arrays(feed)))

    return run


def _on_openvino(data: bytes, outputs: Sequence[str], origin: str, threads: int, precision: Precision) -> Graph:
    """Static shapes: in dynamic ones OpenVINO's gradients were silently wrong."""
    from engines.backends.openvino_engine import StaticModel

    model = StaticModel(data, origin, precision, threads)
    return lambda feed: model(feed, outputs)


def _arrays(feed: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: value.detach().cpu().contiguous().numpy() for name, value in feed.items()}
