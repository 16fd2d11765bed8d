"""ONNX Runtime: an exported network on the provider that was asked for, or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from engines.backends.base import EngineCard, EngineFile, check_input, read_engine, self_test, unreadable
from engines.errors import EngineError

Provider = Literal["CPUExecutionProvider"]
OUTPUT = "out"


class OrtEngine:
    """See `Engine`.

    Args:
        file: an engine file that matches its card.
        origin: what it is called in messages.
        threads: of one evaluation; 0 = all that this process may use.
        provider: where it runs; anything else is an error, never a fallback.

    Raises:
        DataError: the file is not an ONNX model of the kind that `diffrc export` makes; no session is made then.
        EngineError: no such provider here, or the model cannot be loaded.
        ParityError: its numbers are not those of the card.
    """

    def __init__(self, file: EngineFile, origin: str, threads: int = 0, provider: Provider = "CPUExecutionProvider") -> None:
        self._card = file.card
        check_model(file.data, file.card, origin)
        self._session = session(file.data, origin, threads, provider)
        self_test(self, origin)

    @classmethod
    def load(cls, path: Path, threads: int = 0, provider: Provider = "CPUExecutionProvider") -> OrtEngine:
        """The engine of a file with a card beside it. Raises EngineError where they do not belong together, and as above."""
        return cls(read_engine(path), str(path), threads, provider)

    @property
    def card(self) -> EngineCard:
        """What it is."""
        return self._card

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """See `Engine.__call__`."""
        check_input(self._card, x, t, y)
        feed = {"x": x, "t": t} | ({} if y is None else {"y": y})
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


def require_runtime(provider: Provider = "CPUExecutionProvider") -> Any:
    """The onnxruntime module. Ask before long work that ends in an export. Raises EngineError where it or the provider is missing."""
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(f"ONNX Runtime cannot be imported: {error}", 'pip install "diffrc[cpu]"') from None
    if provider not in onnxruntime.get_available_providers():
        have = ", ".join(onnxruntime.get_available_providers())
        raise EngineError(
            f"this ONNX Runtime has no {provider}, only {have}", 'pip install "diffrc[cpu]", and no other onnxruntime beside it'
        )
    return onnxruntime


def session(data: bytes, origin: str, threads: int = 0, provider: Provider = "CPUExecutionProvider") -> Any:
    """An onnxruntime.InferenceSession on that provider, or EngineError; `threads` 0 = all that this process may use."""
    onnxruntime = require_runtime(provider)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 3  # errors
    # The guide's gradient runs in torch between two evaluations; threads that spin while they wait would take its processors.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        made = onnxruntime.InferenceSession(data, options, providers=[provider])
    except Exception as error:  # the runtime raises classes of its own, which share no base
        raise EngineError(f"ONNX Runtime cannot load {origin}: {str(error).splitlines()[0]}", "diffrc export makes it anew") from error
    if made.get_providers()[0] != provider:  # a provider that cannot start is replaced silently
        raise EngineError(f"{origin} runs on {made.get_providers()[0]}, not on {provider}", "--engine torch runs without it")
    return made
