"""What can be known of a runtime without torch: the wheels that hold it, a model of one node, and an import that calls nobody."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Any

ONNXRUNTIME_WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-qnn")
TELEMETRY = "openvino_telemetry"
INPUT, OUTPUT = "x", "out"


def onnxruntime_wheels() -> list[str]:
    """Which wheels of ONNX Runtime are installed. All write the same module, so the one that came last hides, or spoils, the others."""
    found = []
    for name in ONNXRUNTIME_WHEELS:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        found.append(name)
    return found


def one_node_model() -> bytes:
    """The smallest ONNX model that computes: out = x + x, for x of shape (1,) float32."""
    from onnx import TensorProto, helper

    x, out = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in (INPUT, OUTPUT))
    graph = helper.make_graph([helper.make_node("Add", [INPUT, INPUT], [OUTPUT])], "smallest", [x], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data


def import_openvino() -> Any:
    """The module, without the message that importing it otherwise sends to its maker's statistics, unasked, with an id kept in ~/intel."""
    hide = "openvino" not in sys.modules and TELEMETRY not in sys.modules
    if hide:
        sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # cannot be imported: OpenVINO has a stub of its own for that
    try:
        import openvino
    finally:
        if hide:
            del sys.modules[TELEMETRY]
    return openvino
