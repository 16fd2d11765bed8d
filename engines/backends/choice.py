"""Which engine runs: the one that was named, or with `auto` the fastest of those that passed their gate and can run here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from engines.backends import openvino_engine, ort_engine, trt_engine
from engines.backends.base import Engine, EngineFile, Kind, Precision, card_path, engine_path, read_card, read_engine
from engines.backends.device import CPU, CudaStream, choose_device, device_name
from engines.backends.openvino_engine import OpenVinoEngine
from engines.backends.ort_engine import OrtEngine
from engines.backends.trt_engine import PlanFile, TrtEngine
from engines.errors import EngineError


class Build(NamedTuple):
    """A runtime and the precision that it computes in."""

    kind: Kind
    precision: Precision

    def __str__(self) -> str:
        return f"{self.kind} {self.precision}"


BUILDS = (  # of an exported network, the safest first
    Build("onnx", "fp32"),
    Build("openvino", "fp32"),
    Build("openvino", "bf16"),
    Build("onnx", "fp16"),
    Build("tensorrt", "fp32"),
    Build("tensorrt", "bf16"),
    Build("tensorrt", "fp16"),
)

GAINS_NOTHING = "no faster than float32 on a CPU, and less exact"

EngineName = Literal["onnx", "openvino", "tensorrt", "torch", "auto", "all"]
PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]


def builds_of(engine: EngineName, precision: PrecisionName) -> tuple[Build, ...]:
    """The builds that fit what was asked for: "auto" and "all" stand for any. Raises EngineError where none does."""
    fitting = tuple(
        build for build in BUILDS if engine in (build.kind, "auto", "all") and (precision == "auto" or build.precision == precision)
    )
    if not fitting:
        able = " or ".join(build.kind for build in BUILDS if build.precision == precision)
        why = ": ONNX Runtime multiplies nothing in bf16 on a CPU" if (engine, precision) == ("onnx", "bf16") else ""
        raise EngineError(
            f"no {engine} engine computes in {precision}{why}", f"--engine {able} can, where the machine can; or --precision fp32"
        )
    return fitting


def source_of(build: Build) -> Build | None:
    """The build whose ONNX file, and whose card, another is built from: a plan of TensorRT has one."""
    return Build("onnx", build.precision) if build.kind == "tensorrt" else None


def require(build: Build, opset: int = 0) -> None:
    """Raises EngineError where a build cannot run here: no such runtime or device, or not in this precision. Ask before long work.

    Args:
        opset: of the ONNX file, where one is about to be made for it.
    """
    if build.kind == "openvino":
        openvino_engine.require_runtime(build.precision)
        if opset > openvino_engine.MAX_OPSET:
            highest = openvino_engine.MAX_OPSET
            raise EngineError(f"OpenVINO takes opsets up to {highest} here, not {opset}", f"--opset {highest}; or --engine onnx")
    elif build.kind == "tensorrt":
        trt_engine.CudaDevice()
    else:
        assert build.kind == "onnx", build
        ort_engine.require_runtime()


def read(network: Path, build: Build) -> EngineFile:
    """A build's file and card, which belong together; a plan's belong to this machine too. Raises EngineError.

    Args:
        network: the ONNX file in float32, by which all others are found: see `engine_path`.
    """
    path = engine_path(network, *build)
    if source := source_of(build):
        return trt_engine.read_file(path, read_card(engine_path(network, *source), *source))
    return read_engine(path, *build)


def device_of(build: Build, name: str, tell: Callable[[str], None] = lambda _: None) -> torch.device:
    """Where a build runs if "auto", "cpu" or "cuda" is asked for: "auto" is the GPU where torch sees one and the runtime can use it.

    Args:
        tell: hears why "auto" is not the GPU that torch sees.

    Raises EngineError where it cannot run there.
    """
    if build.kind == "openvino":
        if name == "cuda":
            raise EngineError("OpenVINO runs on the CPU here", "--device cpu; or --engine onnx or torch, which run on a GPU")
        return CPU
    if build.kind == "tensorrt":
        if name == "cpu":
            raise EngineError("TensorRT runs on a GPU alone", "--device cuda, or another --engine")
        return torch.device("cuda")
    device = choose_device(name)
    if build.kind == "onnx" and device.type == "cuda":
        try:
            ort_engine.require_runtime(ort_engine.CUDA)
        except EngineError as error:
            if name != "auto":
                raise
            tell(f"not on the GPU: {error.problem}")
            return CPU
    return device


def gains_nothing(build: Build, device: torch.device) -> bool:
    """On a CPU, ONNX Runtime computes what is in fp16 in float32, between casts: as fast as float32, and less exact."""
    return build == Build("onnx", "fp16") and device.type == "cpu"


def load(file: EngineFile, origin: str, threads: int = 0, batch: int = 0, device: torch.device = CPU) -> Engine:
    """The engine of a file, on the runtime and in the precision of its card. A plan was checked to be of this machine: see `read`.

    Args:
        origin: what it is called in messages.
        threads: of one evaluation, of which several may run side by side; 0 = all that this process may use.
        batch: the batch size that will be asked for; 0 = not known.
        device: see `device_of`.

    Raises: as `OrtEngine`, `OpenVinoEngine` and `TrtEngine` do.
    """
    if isinstance(file, PlanFile):
        return TrtEngine(file.data, file.plan_card, origin)
    if file.card.kind == "openvino":
        return OpenVinoEngine(file, origin, threads, batch=batch)
    if device.type == "cuda":
        return OrtEngine(file, origin, threads, ort_engine.CUDA, CudaStream(device), batch)
    return OrtEngine(file, origin, threads, batch=batch)


class Choice(NamedTuple):
    """An engine file to load, and why it was taken."""

    file: EngineFile
    why: str  # "" where nothing was to be chosen
    device: torch.device = CPU  # where it runs
    own: str = ""  # of `why`, what is not about the others

    @property
    def build(self) -> Build:
        """Its runtime and precision."""
        return Build(self.file.card.kind, self.file.card.precision)


def choose(
    path: Path,
    builds: Sequence[Build],
    check: Callable[[EngineFile], None],
    made_with: str = "",
    command: str = "diffrc export",
    device: str = "auto",
) -> Choice:
    """The fastest of a network's published engines, by what was measured at export, among those that can run here.

    A measurement of now would vary from call to call, and with it the engine, in whose name a folder of images is made.

    Args:
        path: the network's ONNX file in float32, by which all others are found: see `engine_path`.
        builds: those that may be taken.
        check: raises EngineError for an engine that does not fit the job.
        made_with: the build, as text, that images to be continued were made with: it is taken where it can be.
        command: what exports the network.
        device: "auto", "cpu" or "cuda"; see `device_of`. What was held to torch on another device is not taken.

    Raises EngineError where none can be taken, with the reason of the first.
    """
    published = [build for build in builds if all(file.is_file() for file in _files(path, build))]
    if not published:
        engine = f" --engine {builds[0].kind}" if len({build.kind for build in builds}) == 1 else ""
        precision = f" --precision {builds[0].precision}" if len(builds) == 1 else ""
        named = "" if len(builds) == len(BUILDS) else f" for {' or '.join(map(str, builds))}"
        raise EngineError(f"{path} is not exported{named}", f"{command}{engine}{precision}; or --engine torch")
    usable: list[EngineFile] = []
    refused: list[tuple[Build, EngineError]] = []
    places: dict[Build, torch.device] = {}
    notes: dict[Build, list[str]] = {build: [] for build in published}
    for build in published:
        try:
            file = read(path, build)
            check(file)
            require(build)
            places[build] = device_of(build, device, notes[build].append)
            if away := _elsewhere(file, places[build]):
                runs_on = places[build].type
                raise EngineError(f"it was held to torch{away}, and would run on {runs_on}", f"{command} --device {runs_on} does it there")
            usable.append(file)
        except EngineError as error:
            refused.append((build, error))
    if not usable:
        raise refused[0][1]
    idle = [build for file in usable if str(build := _build(file)) != made_with and gains_nothing(build, places[build])]
    if len(idle) < len(usable):
        usable = [file for file in usable if _build(file) not in idle]
        refused += [(build, EngineError(GAINS_NOTHING, "")) for build in idle]
    speeds = {_build(file): file.card.ms_per_image for file in usable}
    best = min(usable, key=lambda file: file.card.ms_per_image or float("inf"))
    taken = _build(best)
    if keep := [file for file in usable if str(_build(file)) == made_with]:
        best, why = keep[0], "the images there were made with it"
    elif len(usable) > 1:
        others = ", ".join(f"{build} {_speed(ms)}" for build, ms in speeds.items() if build != taken)
        why = f"the fastest when it was exported: {_speed(speeds[taken])} an image and evaluation; {others}"
    else:
        why = f"no other is exported: {command} --engine all" if len(published) == 1 and len(builds) > 1 else ""
    taken = _build(best)
    left_out = [f"not {build}: {error.problem}" for build, error in refused]
    own, told = ("; ".join(filter(None, (why, *about, *notes[taken]))) for about in ((), left_out))
    return Choice(best, told, places[taken], own)


def _files(network: Path, build: Build) -> tuple[Path, Path]:
    """An engine and its card."""
    path = engine_path(network, *build)
    return path, card_path(path, *build)


def _build(file: EngineFile) -> Build:
    return Build(file.card.kind, file.card.precision)


def _elsewhere(file: EngineFile, device: torch.device) -> str:
    """Where an engine was measured, as " on cpu", if it would run on something else now; a plan is of its GPU alone."""
    if file.card.kind == "tensorrt" or file.card.device == device_name(device):
        return ""
    return f" on {file.card.device}"


def _speed(ms: float) -> str:
    return f"{ms:.3g} ms" if ms else "not measured"
