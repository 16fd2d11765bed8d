"""TensorRT: an exported network as a plan of one GPU, built here, loaded only where it was built, run as a CUDA graph.

Written for TensorRT 11 and kept to what 10 has as well: networks are strongly typed, so the precision is the graph's own and
no builder flag changes it. A plan is machine code without a signature. It is therefore only ever read from a folder of ours,
only beside a card whose every field fits this machine, and the bytes that were hashed are the bytes that are loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from engines import store
from engines.backends import keys
from engines.backends.base import EngineCard, EngineFile, card_path, check_input, package_versions, self_test, self_test_batch
from engines.backends.ort_engine import OUTPUT, check_model, input_names
from engines.errors import EngineError, StorageError, first_line

if TYPE_CHECKING:
    import tensorrt as trt_types

OLDEST = (10, 3)  # memory of ours for several contexts
WORKSPACE_BYTES = 4 * 2**30  # what the builder may use for one layer, where nothing else is asked for
SMALLEST_WORKSPACE_BYTES = 64 * 2**20  # the last rung of the ladder
FLAGS = ("editable_timing_cache", "no_tf32", "strongly_typed")  # how every plan is built; part of what it depends on
INSTALL = 'pip install "diffrc[tensorrt]" on a machine with an NVIDIA GPU, or --engine onnx'
REMEDY = "diffrc export --engine tensorrt makes it anew"
WITHOUT = "--engine torch runs without it"


class Gpu(NamedTuple):
    """The GPU that a plan is for."""

    name: str
    compute_capability: str  # "9.0"
    driver: str  # "580.65.06"


class Batches(NamedTuple):
    """The optimization profile: every batch from `smallest` to `largest` runs, `usual` is the one that kernels are chosen for."""

    smallest: int
    usual: int
    largest: int


class Build(BaseModel):
    """All that a plan depends on. One field that differs, and it is not loaded."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    onnx_sha256: str
    tensorrt: str  # version
    gpu: str
    compute_capability: str
    driver: str
    precision: str
    batches: Batches
    flags: tuple[str, ...] = FLAGS


class PlanCard(BaseModel):
    """The JSON beside a plan."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    engine: EngineCard  # as of every engine; `file_sha256` is the plan's
    build: Build
    workspace_bytes: int  # the bound that the builder came through with
    build_seconds: float


@dataclass(frozen=True)
class PlanFile(EngineFile):
    """A plan that is what its card says, of this machine."""

    plan_card: PlanCard


class Device(Protocol):
    """What this engine needs of a GPU. `CudaDevice` is the real one; that of the tests keeps its rules on a CPU."""

    @property
    def gpu(self) -> Gpu:
        """Which one it is."""
        ...

    @property
    def stream(self) -> int:
        """The handle of a stream of its own, never the default stream."""
        ...

    def tensorrt(self) -> Any:
        """The TensorRT module. Raises EngineError."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Device memory, 256-byte aligned, that lives as long as the tensor. Raises EngineError where there is none left."""
        ...

    def copy(self, destination: Tensor, source: Tensor) -> None:
        """Copy in the order of the stream."""
        ...

    def ordered(self) -> AbstractContextManager[None]:
        """The stream runs after what the caller has queued so far, and what the caller queues next after the stream."""
        ...

    def synchronize(self) -> None:
        """Wait for the stream."""
        ...

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record what `enqueue` puts on the stream without running it; the result replays it."""
        ...


class TrtEngine:
    """See `Engine`. Threads may call it side by side and run in turn: all batches share one stream and one scratch memory.

    Args:
        plan: the bytes that the card's hash is of.
        card: of the plan, and of this machine: `load` has checked it.
        origin: what it is called in messages.
        device: where it runs; default the current CUDA device.

    Raises:
        EngineError: no TensorRT or GPU here, or the plan is not what its card says.
        ParityError: its numbers are not those of the card.
    """

    def __init__(self, plan: bytes, card: PlanCard, origin: str, device: Device | None = None) -> None:
        assert hashlib.sha256(plan).hexdigest() == card.engine.file_sha256
        self.plan_card = card
        self._origin = origin
        self._device = device or CudaDevice()
        self._trt = self._device.tensorrt()
        self._log = _logger(self._trt)  # TensorRT's objects keep no reference to it
        self._runtime: trt_types.Runtime = self._trt.Runtime(self._log)
        engine: Any = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(f"TensorRT cannot load {origin}: {self._log.last()}", REMEDY)
        self._engine: trt_types.ICudaEngine = engine
        _check_plan(self._trt, self._engine, card, origin)
        self._scratch = self._device.empty((max(1, self._engine.device_memory_size_v2),), torch.uint8)
        self._lanes: dict[int, _Lane] = {}
        self._turn = threading.Lock()
        self_test(self, origin, card.build.batches.usual)  # the batch whose lane will be needed

    @classmethod
    def load(cls, path: Path, onnx: EngineCard, batches: Batches, device: Device | None = None) -> TrtEngine:
        """The plan of a file with its card.

        Args:
            path: `<name>.plan`.
            onnx: the card of the exported network that it must have been built from.
            batches: the profile that it must have been built for.

        Raises:
            EngineError: it is missing, damaged, not ours, or built from or for anything else. TensorRT has not seen it then.
            ParityError: see `TrtEngine`.
        """
        device = device or CudaDevice()
        plan, card = read_plan(path, wanted(onnx, batches, device))
        return cls(plan, card, str(path), device)

    @property
    def card(self) -> EngineCard:
        """What it is."""
        return self.plan_card.engine

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """See `Engine.__call__`."""
        check_input(self.card, x, t, y)
        smallest, batch = self.plan_card.build.batches.smallest, len(x)
        assert batch >= smallest, f"batch {batch}, at least {smallest}"
        device = self._device
        with self._turn:
            lane = self._lanes.get(batch)
            if lane is None:
                lane = self._lanes[batch] = self._lane(batch)
            out = device.empty((batch, *self._out_shape), torch.float32)  # the caller's own: the next call overwrites the lane's
            with device.ordered():
                for name, value in zip(input_names(self.card), (x, t, y), strict=False):
                    assert value is not None
                    device.copy(lane.buffers[name], value)
                lane.run()
                device.copy(out, lane.buffers[OUTPUT])
        return out.to(x.device)

    @property
    def _out_shape(self) -> tuple[int, int, int]:
        return (self.card.out_channels, *self.card.shape[1:])

    def _lane(self, batch: int) -> _Lane:
        """Buffers, context and graph of one batch size. A graph holds its context's addresses: each has a context of its own."""
        trt, device, card = self._trt, self._device, self.card
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED  # else every context would take the largest batch's memory
        context: Any = self._engine.create_execution_context(strategy)
        if context is None:
            raise EngineError(f"TensorRT cannot run {self._origin}: {self._log.last()}", WITHOUT)
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.nbytes)
        buffers = {"x": device.empty((batch, *card.shape), torch.float32), "t": device.empty((batch,), torch.int64)}
        if card.classes:
            buffers["y"] = device.empty((batch,), torch.int64)
        inputs = tuple(buffers)
        buffers[OUTPUT] = device.empty((batch, *self._out_shape), torch.float32)
        for name in inputs:
            self._require(context.set_input_shape(name, tuple(buffers[name].shape)))
        for name, buffer in buffers.items():
            self._require(context.set_tensor_address(name, buffer.data_ptr()))
        self._require(not context.infer_shapes())  # the names of inputs that are still missing

        def enqueue() -> None:
            self._require(context.execute_async_v3(device.stream))

        with device.ordered():
            for name in inputs:
                device.copy(buffers[name], torch.zeros_like(buffers[name]))
            enqueue()  # TensorRT does what the new shapes ask for at the first run: it must not be part of the graph
        device.synchronize()
        return _Lane(context, buffers, device.capture(enqueue))

    def _require(self, good: bool) -> None:
        if not good:
            raise EngineError(f"TensorRT cannot run {self._origin}: {self._log.last()}", WITHOUT)


@dataclass(frozen=True)
class _Lane:
    context: Any  # must outlive the graph
    buffers: dict[str, Tensor]
    run: Callable[[], None]


def make_plan(
    onnx: EngineFile,
    path: Path,
    batches: Batches,
    gate: Callable[[EngineCard, TrtEngine], EngineCard],
    tolerance: float,
    workspace_bytes: int = WORKSPACE_BYTES,
    device: Device | None = None,
) -> PlanCard:
    """Build a plan, and write it and its card if and only if `gate` lets it pass.

    Args:
        onnx: an exported network with the card that its own parity gate gave it.
        path: `<name>.plan`; the timing cache lies beside it.
        gate: compares the engine with torch; gives the card with what it measured, or raises ParityError.
        tolerance: relative L2 of one evaluation, for the card and the self-test at every load.
        workspace_bytes: bound of the builder's scratch memory; halved while the builder runs out of memory.

    Raises:
        DataError: the ONNX file is not of the kind that `diffrc export` makes.
        EngineError: no TensorRT or GPU here, the builder failed, or the folder is not ours alone.
        ParityError: a number disagrees; nothing is written.
        StorageError: the files cannot be written.
    """
    device = device or CudaDevice()
    device.tensorrt()  # asked for before any folder is made
    assert 1 <= batches.smallest <= batches.usual <= batches.largest <= onnx.card.max_batch
    assert self_test_batch(onnx.card) <= batches.largest, "torch's values on the card are of that many images"
    _own_folder(path.parent)
    started = time.perf_counter()
    built = build_plan(device.tensorrt(), onnx, path.name, batches, workspace_bytes, _read_timing_cache(path, device))
    seconds = time.perf_counter() - started
    engine = onnx.card.model_copy(
        update={
            "kind": "tensorrt",
            "file_sha256": hashlib.sha256(built.plan).hexdigest(),
            "max_batch": batches.largest,
            "device": device.gpu.name,
            "tolerance": tolerance,
            "versions": onnx.card.versions | package_versions(("tensorrt",)),  # what the library itself says is in the key
        }
    )
    build = wanted(onnx.card, batches, device)
    card = PlanCard(engine=engine, build=build, workspace_bytes=built.workspace_bytes, build_seconds=seconds)
    card = card.model_copy(update={"engine": gate(engine, TrtEngine(built.plan, card, path.name, device))})
    _write_timing_cache(path, built.timing_cache, device)
    store.write_bytes(path, built.plan)
    store.write_text(card_path(path), card.model_dump_json(indent=1) + "\n")  # last: killed before it, the plan has no card
    return card


def wanted(onnx: EngineCard, batches: Batches, device: Device) -> Build:
    """What a plan must have been built from and for, to be loaded here now. Raises EngineError where there is no TensorRT."""
    return Build(
        onnx_sha256=onnx.file_sha256,
        tensorrt=str(device.tensorrt().__version__),
        gpu=device.gpu.name,
        compute_capability=device.gpu.compute_capability,
        driver=device.gpu.driver,
        precision=onnx.precision,
        batches=batches,
    )


def differences(found: Build, expected: Build) -> list[str]:
    """A sentence for every field that differs."""
    return [str(difference) for difference in keys.differences(found, expected.model_dump())]


def batches_of(onnx: EngineCard) -> Batches:
    """The profile of a network's plan: from one image to what its ONNX file was checked for, best at the batch of synthesis."""
    return Batches(1, onnx.measured_batch or onnx.max_batch, onnx.max_batch)


def read_file(path: Path, onnx: EngineCard, device: Device | None = None) -> PlanFile:
    """The plan of an exported network for this machine. Raises EngineError that names what does not fit."""
    data, card = read_plan(path, wanted(onnx, batches_of(onnx), device or CudaDevice()))
    return PlanFile(data, card.engine, card)


def read_plan(path: Path, expected: Build) -> tuple[bytes, PlanCard]:
    """A plan and its card, read once and checked. Raises EngineError that names what does not fit."""
    _require_own(path.parent, path, card_path(path))
    try:
        card = PlanCard.model_validate_json(_read_own(card_path(path)))
    except ValidationError as error:
        reason = f"{len(error.errors())} wrong or missing values"
        raise EngineError(f"{card_path(path)} is not the card of a plan of this version: {reason}", REMEDY) from None
    if stale := differences(card.build, expected):
        raise EngineError(f"{path} was built for something else: {'; '.join(stale)}", REMEDY)
    if (card.engine.precision, card.engine.max_batch) != (card.build.precision, card.build.batches.largest):
        raise EngineError(f"{card_path(path)} contradicts itself", REMEDY)
    data = _read_own(path)
    if hashlib.sha256(data).hexdigest() != card.engine.file_sha256:
        raise EngineError(f"{path} is not the file that its card describes", REMEDY)
    return data, card


# -------------------------------------------------------------------------------------------------------------- builder


class Built(NamedTuple):
    """What the builder gave."""

    plan: bytes
    timing_cache: bytes
    workspace_bytes: int


def build_plan(trt: Any, onnx: EngineFile, origin: str, batches: Batches, workspace_bytes: int, timing_cache: bytes = b"") -> Built:
    """Parse and build a network.

    A builder that runs out of GPU memory is asked again with half the workspace, down to SMALLEST_WORKSPACE_BYTES; it is
    never asked for a smaller batch, which would be another engine than the one that was ordered.

    Args:
        trt: the TensorRT module.
        timing_cache: of an earlier build here; b"" = none.

    Raises:
        DataError: not an ONNX file of ours.
        EngineError: it cannot be parsed or built; carries TensorRT's own words.
    """
    check_model(onnx.data, onnx.card, origin)
    workspace = workspace_bytes
    while True:
        log = _logger(trt)
        built = _build_once(trt, log, onnx, origin, batches, workspace, timing_cache)
        if built is not None:
            return built
        if not log.out_of_memory():
            raise EngineError(f"TensorRT cannot build {origin}: {log.last()}", f"please report it; {WITHOUT}")
        if workspace // 2 < SMALLEST_WORKSPACE_BYTES:
            problem = f"the GPU has too little memory to build {origin} for batches up to {batches.largest}"
            tried = f"workspaces from {workspace_bytes / 2**20:,.0f} down to {workspace / 2**20:,.0f} MiB were tried"
            raise EngineError(f"{problem}; {tried}", "free the GPU, or export for a smaller batch with --batch N")
        workspace //= 2


def _build_once(
    trt: Any, log: Any, onnx: EngineFile, origin: str, batches: Batches, workspace_bytes: int, timing_cache: bytes
) -> Built | None:
    """One attempt; None where the builder gave up, with the reason in `log`."""
    builder: trt_types.Builder = trt.Builder(log)
    network: trt_types.INetworkDefinition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser: Any = trt.OnnxParser(network, log)
    if not parser.parse(onnx.data):
        reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise EngineError(f"TensorRT cannot read {origin}: {(reasons or [log.last()])[0]}", f"please report it; {WITHOUT}")
    config: trt_types.IBuilderConfig = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and 1e-3 off: float32 means float32
    config.set_flag(trt.BuilderFlag.EDITABLE_TIMING_CACHE)  # the same kernels are chosen again by the next build
    cache = _timing_cache(config, timing_cache)
    profile: Any = builder.create_optimization_profile()
    for name in input_names(onnx.card):
        sizes = onnx.card.shape if name == "x" else ()
        smallest, usual, largest = ((batch, *sizes) for batch in batches)
        profile.set_shape(name, smallest, usual, largest)
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(f"TensorRT does not take batches {tuple(batches)} for {origin}: {log.last()}", f"please report it; {WITHOUT}")
    plan: Any = builder.build_serialized_network(network, config)  # None where it failed
    return None if plan is None else Built(bytes(plan), bytes(cache.serialize()), workspace_bytes)


def _timing_cache(config: trt_types.IBuilderConfig, data: bytes) -> Any:
    """An earlier build's timings, or none where they are not of this TensorRT and GPU: only time is lost."""
    if data:
        earlier: Any = config.create_timing_cache(data)
        if earlier is not None and config.set_timing_cache(earlier, ignore_mismatch=False):
            return earlier
    empty = config.create_timing_cache(b"")
    config.set_timing_cache(empty, ignore_mismatch=False)
    return empty


def _check_plan(trt: Any, engine: Any, card: PlanCard, origin: str) -> None:
    """The plan has the tensors, types and profile that its card says. Raises EngineError."""
    inputs, batches = input_names(card.engine), card.build.batches
    image = (trt.DataType.FLOAT, card.engine.shape)
    labels: tuple[Any, tuple[int, ...]] = (trt.DataType.INT64, ())
    expected = {name: (trt.TensorIOMode.INPUT, *(image if name == "x" else labels)) for name in inputs}
    expected[OUTPUT] = (trt.TensorIOMode.OUTPUT, trt.DataType.FLOAT, (card.engine.out_channels, *card.engine.shape[1:]))
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = {
        name: (engine.get_tensor_mode(name), engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name))[1:]) for name in names
    }
    if found != expected:
        raise EngineError(f"{origin} has other inputs or outputs than its card says: {found}", REMEDY)
    for name in inputs:
        sizes = card.engine.shape if name == "x" else ()
        profile = [tuple(shape) for shape in engine.get_tensor_profile_shape(name, 0)]
        if engine.num_optimization_profiles != 1 or profile != [(batch, *sizes) for batch in batches]:
            raise EngineError(f"{origin} is for other batches than its card says: {profile}", REMEDY)


def _logger(trt: Any) -> Any:
    """A logger that keeps what went wrong and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]  # the module is only known here
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(msg.split()))

        def last(self) -> str:
            return self.errors[-1] if self.errors else "it gave no reason"

        def out_of_memory(self) -> bool:
            """Also where the last words are only that no kernel is left: those before them told why."""
            said = " ".join(self.errors).lower()
            return any(words in said for words in ("outofmemory", "out of memory", "could not be allocated"))

    return Log()


# ---------------------------------------------------------------------------------------------------------- own folder


def _own_folder(folder: Path) -> None:
    """Make the folder of the plans, ours alone. Raises StorageError, EngineError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {folder}: {error.strerror}", "choose a folder that can be written") from error
    _require_own(folder)


def _require_own(folder: Path, *files: Path) -> None:
    """Nobody else can have put a plan there: it would run as us. Raises EngineError."""
    for path in (folder, *files):
        try:
            found = path.lstat()
        except OSError as error:
            raise EngineError(f"cannot read {path}: {error.strerror}", "diffrc export --engine tensorrt") from None
        right_kind = stat.S_ISDIR(found.st_mode) if path == folder else stat.S_ISREG(found.st_mode)
        if not right_kind or found.st_uid != os.geteuid():
            raise EngineError(f"{path} is not a {'folder' if path == folder else 'file'} of yours: plans are code", REMEDY)
    if stat.S_IMODE(folder.lstat().st_mode) & 0o022:
        raise EngineError(f"others can write to {folder}, and plans are code", f"chmod go-w {folder}, then {REMEDY}")


def _read_own(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}", REMEDY) from None


def _timing_cache_path(plan: Path, device: Device) -> Path:
    """One cache for each TensorRT, GPU and driver: timings of another are wrong, and their format may be."""
    machine = repr((str(device.tensorrt().__version__), *device.gpu)).encode()
    return plan.parent / f"timing-{hashlib.sha256(machine).hexdigest()[:16]}.cache"


def _read_timing_cache(plan: Path, device: Device) -> bytes:
    """The cache of earlier builds, b"" where there is none or it is damaged: it saves time and decides nothing."""
    path = _timing_cache_path(plan, device)
    try:
        _require_own(path.parent, path)
        data = _read_own(path)
    except EngineError:
        return b""
    digest, body = data[:32], data[32:]
    return body if hashlib.sha256(body).digest() == digest else b""


def _write_timing_cache(plan: Path, data: bytes, device: Device) -> None:
    store.write_bytes(_timing_cache_path(plan, device), hashlib.sha256(data).digest() + data)


# ---------------------------------------------------------------------------------------------------------------- CUDA


class CudaDevice:
    """See `Device`: the current CUDA device, by torch. Raises EngineError where there is none."""

    def __init__(self) -> None:
        self.tensorrt()  # first: what is missing is told in the order in which it is to be installed
        if not torch.cuda.is_available():
            raise EngineError("TensorRT needs an NVIDIA GPU, and torch finds none here", f"install torch with CUDA, or {WITHOUT}")
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        major, minor = torch.cuda.get_device_capability(self._device)
        self._gpu = Gpu(torch.cuda.get_device_name(self._device), f"{major}.{minor}", driver_version())

    @property
    def gpu(self) -> Gpu:
        """See `Device.gpu`."""
        return self._gpu

    @property
    def stream(self) -> int:
        """See `Device.stream`."""
        return int(self._stream.cuda_stream)

    def tensorrt(self) -> Any:
        """See `Device.tensorrt`."""
        return require_tensorrt()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See `Device.empty`: torch aligns to 512 bytes."""
        try:
            return torch.empty(shape, dtype=dtype, device=self._device)
        except torch.OutOfMemoryError:
            raise EngineError("the GPU has too little memory for this batch", "a smaller synth.batch_size, or free the GPU") from None

    def copy(self, destination: Tensor, source: Tensor) -> None:
        """See `Device.copy`."""
        destination.copy_(source)

    @contextlib.contextmanager
    def ordered(self) -> Iterator[None]:
        """See `Device.ordered`."""
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            yield
        caller.wait_stream(self._stream)

    def synchronize(self) -> None:
        """See `Device.synchronize`."""
        self._stream.synchronize()

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """See `Device.capture`. Replay it within `ordered`: it runs on the stream that is current then."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                enqueue()
        except RuntimeError as error:  # of the CUDA runtime, which has no classes
            raise EngineError(f"TensorRT's run cannot become a CUDA graph: {first_line(error)}", WITHOUT) from error
        return graph.replay


def require_tensorrt() -> Any:
    """The tensorrt module. Raises EngineError where it is missing, without its library, or too old."""
    try:
        import tensorrt
    except Exception as error:  # the stub without its library raises what it likes
        raise EngineError(f"TensorRT cannot be imported: {first_line(error)}", INSTALL) from None
    version = str(getattr(tensorrt, "__version__", ""))
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise EngineError(f"this is TensorRT {version or 'of an unknown version'}; {needed} or newer is needed", INSTALL)
    return tensorrt


def driver_version() -> str:
    """The NVIDIA driver's version, by the management library that comes with it. Raises EngineError."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(96)
        if library.nvmlInit_v2() == 0:
            try:
                failed = library.nvmlSystemGetDriverVersion(text, len(text))
            finally:
                library.nvmlShutdown()
            if not failed and text.value:
                return text.value.decode("ascii", "replace")
    except (OSError, AttributeError) as error:
        problem = f"the NVIDIA driver's version cannot be read: {error}"
        raise EngineError(problem, f"install the driver's libnvidia-ml, or {WITHOUT}") from None
    raise EngineError("the NVIDIA driver does not tell its version", f"nvidia-smi shows what is wrong; {WITHOUT}")
