"""An ONNX graph of any inputs and outputs on ONNX Runtime or OpenVINO: tensors by name in, tensors out; and what its card holds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from engines.backends import ort_engine
from engines.backends.base import REMEDY, SELF_TEST_MARGIN, Precision, card_path, write_with_card
from engines.errors import EngineError

Runtime = Literal["onnx", "openvino"]

Graph = Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]
"""Inputs by name, all of one batch -> outputs in order, on the device of the first input; never views of a runtime's buffers."""


LOOSEST = 0.5  # relative error that the load-time test allows at most: a gradient the wrong way is off by 2, none at all by 1


class GraphCard(BaseModel):
    """What the card of a gradient and that of a guided step have in common. Without a card, no graph is loaded."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    runtime: Runtime  # the one that passed the gate
    precision: Literal["fp32", "bf16"]  # what it computes in; inputs and outputs are float32
    recipe_sha256: str  # of the sections that shape the network and its export
    file_sha256: str
    image_size_px: int
    image_channels: int  # C
    classes: int  # K; y is 0..K-1
    timesteps: int  # T; t is 0..T-1
    max_batch: int
    opset: int
    versions: dict[str, str]  # of the packages that made it
    tolerance: float  # see `self_test_limit`
    self_test: tuple[float, ...]  # torch's values at a fixed input, thinned out

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.image_channels, self.image_size_px, self.image_size_px

    @property
    def self_test_limit(self) -> float:
        """Relative error that is allowed at load time: other processors choose other kernels."""
        return min(SELF_TEST_MARGIN * self.tolerance, LOOSEST)


Card = TypeVar("Card", bound=GraphCard)


def write_graph(path: Path, data: bytes, card: GraphCard) -> None:
    """Commit a file, then its card, as `write_engine` does. Raises StorageError."""
    write_with_card(path, data, card.file_sha256, card_path(path, card.runtime, card.precision), card)


def read_graph(path: Path, kind: type[Card], runtime: Runtime, precision: Precision, what: str) -> tuple[bytes, Card]:
    """A file that is what its card for a runtime and precision says. Raises EngineError where one is missing or another's.

    Args:
        what: such a card is of, for messages.
    """
    at = card_path(path, runtime, precision)
    try:
        card = kind.model_validate_json(at.read_bytes())
        data = path.read_bytes()
    except ValidationError as error:
        reason = f"{len(error.errors())} wrong or missing values"
        raise EngineError(f"{at} is not the card of {what} of this version: {reason}", REMEDY) from None
    except OSError as error:
        raise EngineError(f"cannot read {error.filename}: {error.strerror}", REMEDY) from None
    if (card.runtime, card.precision) != (runtime, precision):
        problem = f"{at} is the card of {card.runtime} in {card.precision}, not of {runtime} in {precision}"
        raise EngineError(problem, REMEDY)
    if hashlib.sha256(data).hexdigest() != card.file_sha256:
        raise EngineError(f"{path} is not the file that its card describes", REMEDY)
    return data, card


def repeated(values: Sequence[Tensor], images: int, batch: int) -> list[tuple[Tensor, ...]]:
    """Inputs of `images` images, again and again until they fill batches of `batch`: kernels are chosen by size."""
    rows = torch.arange(-(-images // batch) * batch) % images
    parts = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    return [tuple(value[part] for value in values) for part in parts]


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
