"""A torch module as one self-contained ONNX file: dynamic batch, standard operators, nothing of the machine it was made on."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engines.errors import EngineError, first_line

MAX_FILE_BYTES = 2**31 - 1  # of one protobuf message


def to_onnx(module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], opset: int) -> Any:
    """Export a module with torch's dynamo exporter. The batch, dimension 0 of every input, is the only dynamic size.

    Args:
        module: in evaluation mode; takes the inputs by position.
        inputs: examples by name. Their batch is equal to no other size in them, or the exporter ties the two together.

    Returns: an onnx.ModelProto.

    Raises EngineError.
    """
    batch = torch.export.Dim("batch")
    with quiet():
        try:
            program = torch.onnx.export(
                module,
                tuple(inputs.values()),
                dynamo=True,
                opset_version=opset,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=tuple({0: batch} for _ in inputs),
                verbose=False,
            )
            assert program is not None
            model = program.model_proto
        except Exception as error:  # the exporter wraps whatever failed in classes of its own
            raise EngineError(f"torch cannot export this network: {first_line(error)}", "--debug shows where; please report it") from error
    strip(model)
    return model


def to_opset(model: Any, opset: int) -> Any:
    """The same graph in a later opset, for what later versions of its operators take; its operators mean the same there.

    Raises EngineError where one of them cannot be carried over.
    """
    from onnx import version_converter

    try:
        converted = version_converter.convert_version(model, opset)
    except Exception as error:  # of onnx's C++, which has no classes of its own
        raise EngineError(f"ONNX cannot carry this network to opset {opset}: {first_line(error)}", "please report it") from error
    strip(converted)
    return converted


def serialized(model: Any, properties: Mapping[str, str]) -> bytes:
    """The bytes of a model with its provenance as metadata; the same model gives the same bytes."""
    for key, value in properties.items():
        model.metadata_props.add(key=f"diffrc.{key}", value=value)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def strip(model: Any) -> None:
    """Take out what the exporter notes about the machine it ran on: stack traces with paths, in nodes and values."""
    model.doc_string = ""
    del model.metadata_props[:]
    graph = model.graph
    graph.doc_string = ""
    del graph.value_info[:]
    del graph.metadata_props[:]
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's chatter and advice to developers from the user's terminal; its errors are raised all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
