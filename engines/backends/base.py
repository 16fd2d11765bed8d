"""What an inference engine is, and the card without which no engine file is loaded."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from engines import store
from engines.diffusion.noise import batch_noise, image_key
from engines.errors import DataError, EngineError, ParityError

Kind = Literal["torch", "onnx", "openvino", "tensorrt"]
Precision = Literal["fp32", "bf16", "fp16"]

SELF_TEST_MARGIN = 10.0  # other processors choose other kernels: load-time agreement may be this many times the export's tolerance
HALF_MARGIN = 2.5  # in half precision, of the error of the export: operands round alike everywhere, and noise of 1e-2 is more than that
SELF_TEST_VALUES = 64
REMEDY = "diffrc export makes it anew"


class EngineCard(BaseModel):
    """What an engine file is, measured when it was made: the JSON beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    kind: Kind
    precision: Precision  # what it computes in; x and the output are float32
    recipe_sha256: str  # of the sections that shape the network and its export
    weights_sha256: str  # `weights_sha256` of the network
    file_sha256: str  # of the engine file; "" where there is none (torch)
    image_size_px: int
    image_channels: int  # C
    out_channels: int  # C, or 2C with a learned variance
    classes: int  # rows of the label embedding, the last of them the null label; 0 = unconditional
    timesteps: int  # T: t is 0..T-1
    max_batch: int
    opset: int  # 0 where there is none
    versions: dict[str, str]  # of the packages that made it
    device: str = "cpu"  # where it was held to torch and measured: "cpu", or the GPU's name
    tolerance: float  # relative L2 of one evaluation that the export was held to
    one_step_error: float  # the worst that was measured
    trajectory_psnr_db: float  # of a short trajectory, the worst image
    self_test: tuple[float, ...]  # torch's values at `example_input`, thinned out
    trajectory_median_psnr_db: float = 0.0
    trajectory_images: int = 0  # that were compared
    label_agreement: float = 0.0  # share of them that keep the label torch's have; 0 where `labels_by` is ""
    labels_by: Literal["", "recognizer", "guide"] = ""  # what said which class they are of
    measured_batch: int = 0  # batch of the next two: the one that synth runs; 0 = not measured
    ms_per_image: float = 0.0  # of one evaluation, when it was exported, on all processors
    torch_ms_per_image: float = 0.0  # of torch in the same minute

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.image_channels, self.image_size_px, self.image_size_px


class Engine(Protocol):
    """A denoising network that can be evaluated, wherever it runs."""

    @property
    def card(self) -> EngineCard:
        """What it is."""
        ...

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Evaluate the network.

        Args:
            x: (B, C, H, W) float32, B <= card.max_batch; the caller pads.
            t: (B,) int64 training timesteps.
            y: (B,) int64 labels where the network is conditional, else None.

        Returns: (B, card.out_channels, H, W) float32 on x's device; never a view of an engine's buffer.
        """
        ...


@dataclass(frozen=True)
class EngineFile:
    """An engine file that is what its card says: its bytes are read once and checked."""

    data: bytes
    card: EngineCard


def card_path(engine: Path, kind: Kind = "onnx", precision: Precision = "fp32") -> Path:
    """The card of `target.onnx` is `target.json`; of the same file in OpenVINO, `target.openvino-bf16.json`."""
    return engine.with_suffix(f".openvino-{precision}.json" if kind == "openvino" else ".json")


def engine_path(network: Path, kind: Kind = "onnx", precision: Precision = "fp32") -> Path:
    """Where an engine lies, by the ONNX file of its network in float32, `onnx/target.onnx`.

    OpenVINO takes that file in every precision; in half precision ONNX Runtime takes `onnx/target.fp16.onnx`. TensorRT takes a plan
    that was built from one of them: `tensorrt/target.plan`, `tensorrt/target.fp16.plan`.
    """
    cast = "" if precision == "fp32" or kind == "openvino" else f".{precision}"
    if kind == "tensorrt":
        return network.parent.with_name("tensorrt") / f"{network.stem}{cast}.plan"
    return network.with_suffix(f"{cast}{network.suffix}")


def read_card(engine: Path, kind: Kind = "onnx", precision: Precision = "fp32") -> EngineCard:
    """The card beside an engine file, for one runtime and precision.

    Raises EngineError where either is missing, or the card is not one of this version or is of another runtime or precision.
    """
    path = card_path(engine, kind, precision)
    for file in (engine, path):
        if not file.is_file():
            raise EngineError(f"there is no {'card' if file == path else 'engine'} {file}", "diffrc export")
    try:
        card = EngineCard.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = f"{len(error.errors())} wrong or missing values" if isinstance(error, ValidationError) else str(error)
        raise EngineError(f"{path} is not the card of an engine of this version: {reason}", REMEDY) from None
    if (card.kind, card.precision) != (kind, precision):
        raise EngineError(f"{path} is the card of {card.kind} in {card.precision}, not of {kind} in {precision}", REMEDY)
    return card


def read_engine(path: Path, kind: Kind = "onnx", precision: Precision = "fp32") -> EngineFile:
    """An engine file with its card. Raises EngineError where one is missing or they do not belong together."""
    card = read_card(path, kind, precision)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}", REMEDY) from None
    if hashlib.sha256(data).hexdigest() != card.file_sha256:
        raise EngineError(f"{path} is not the file that its card describes", REMEDY)
    return EngineFile(data, card)


def write_engine(path: Path, data: bytes, card: EngineCard) -> None:
    """Commit an engine file, then its card: killed between the two, what lies there is refused. Raises StorageError.

    Cards of other runtimes for the same file stay good where its bytes do not change, and are refused where they do.
    """
    write_with_card(path, data, card.file_sha256, card_path(path, card.kind, card.precision), card)


def write_with_card(path: Path, data: bytes, sha256: str, place: Path, card: BaseModel) -> None:
    """`write_engine` for any kind of card, which says `sha256` of the file and goes to `place`. Raises StorageError."""
    assert hashlib.sha256(data).hexdigest() == sha256
    if not path.is_file() or path.read_bytes() != data:
        store.write_bytes(path, data)
    store.write_text(place, card.model_dump_json(indent=1) + "\n")


def weights_sha256(module: nn.Module) -> str:
    """sha256 of every parameter and buffer: names, types, shapes and values."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        total.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        total.update(value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return total.hexdigest()


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def example_input(card: EngineCard, batch: int, first_t: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """A fixed input of a network: noise, timesteps spread over 0..T-1 from `first_t` on, labels in turn."""
    x = batch_noise([image_key(0, 0, i) for i in range(batch)], 0, card.shape)
    t = (first_t + torch.arange(batch) * max(1, card.timesteps // 7)) % card.timesteps
    return x, t, torch.arange(batch) % card.classes if card.classes else None


def thinned(output: Tensor) -> Tensor:
    """At most SELF_TEST_VALUES values of an output, evenly spread."""
    flat = output.detach().float().cpu().flatten()
    at = np.unique(np.linspace(0, len(flat) - 1, SELF_TEST_VALUES).round().astype(np.int64))
    return flat[torch.from_numpy(at)]


def self_test_batch(card: EngineCard) -> int:
    """Images of the load-time self-test."""
    return min(3, card.max_batch)


def self_test(engine: Engine, origin: str, batch: int = 0) -> None:
    """Evaluate the fixed input and compare with what torch gave. Raises ParityError naming both numbers.

    Args:
        batch: evaluate in batches of this many, the last one filled up: kernels are chosen by size. 0 = all of the input at once.
    """
    card = engine.card
    images = self_test_batch(card)
    batch = min(batch, card.max_batch) or images
    x, t, y = example_input(card, -(-images // batch) * batch, 0)  # begins with the same images whatever its length
    parts = [slice(start, start + batch) for start in range(0, len(x), batch)]
    expected = torch.tensor(card.self_test, dtype=torch.float32)
    out = torch.cat([engine(x[part], t[part], None if y is None else y[part]) for part in parts])
    found = thinned(out[:images])
    sound = found.shape == expected.shape and bool(out.isfinite().all())  # of every row, also of those that only fill the batch
    error, limit = relative_error(found, expected) if sound else float("inf"), self_test_limit(card)
    if not error <= limit:  # also where it is not a number
        raise ParityError(f"{origin} disagrees with torch: relative error {error:.2g}, {limit:.2g} allowed", REMEDY)


def self_test_limit(card: EngineCard) -> float:
    """Relative error that is allowed at load time.

    In half precision, whose tolerance is wide, it is held to what was measured at export, where that was on the same kind of device.
    """
    widest = SELF_TEST_MARGIN * card.tolerance
    elsewhere = card.kind == "onnx"  # the one file runs on the CPU and on GPUs, which add up in other precisions
    return widest if card.precision == "fp32" or elsewhere or not card.one_step_error else min(widest, HALF_MARGIN * card.one_step_error)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; infinite where `expected` is 0 and `found` is not."""
    difference, size = float((found - expected).norm()), float(expected.norm())
    return difference / size if size else (0.0 if difference == 0 else float("inf"))


def check_input(card: EngineCard, x: Tensor, t: Tensor, y: Tensor | None) -> None:
    """Hold callers to the contract of `Engine`; also keeps a runtime from reading outside its tables.

    Values are looked at on the CPU alone: a GPU would have to be waited for at each step, and with it all that is queued.
    """
    batch = len(x)
    assert x.shape[1:] == card.shape and x.dtype == torch.float32, f"{tuple(x.shape)} {x.dtype} for {card.shape}"
    assert 1 <= batch <= card.max_batch, f"batch {batch}, at most {card.max_batch}"
    assert t.shape == (batch,) and t.dtype == torch.int64 and _within(t, card.timesteps)
    assert (y is not None) == bool(card.classes), "labels go with a conditional network, and only with one"
    if y is not None:
        assert y.shape == (batch,) and y.dtype == torch.int64 and _within(y, card.classes)


def _within(index: Tensor, rows: int) -> bool:
    return index.device.type != "cpu" or (int(index.min()) >= 0 and int(index.max()) < rows)


def unreadable(path: Path | str, reason: str) -> DataError:
    """The refusal of an engine file's content."""
    return DataError(f"{path} is refused: {reason}", REMEDY)
