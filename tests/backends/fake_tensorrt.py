"""A computer with a GPU and TensorRT, made of this CPU: it computes with ONNX Runtime in float32 and holds callers to TensorRT's rules.

What breaks a rule that TensorRT itself would not notice (memory that was freed, a graph whose context has changed) fails an
assertion here; what TensorRT refuses is refused in its way: False or None, with the reason in the log.
"""

from __future__ import annotations

import contextlib
import enum
import json
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from engines.backends.cast import widened
from engines.backends.trt_engine import Gpu
from engines.errors import EngineError

MAGIC = b"fake plan\n"
ALIGNMENT_BYTES = 256
STREAM = 0x57
TF32_ERROR = 1e-3
H200 = Gpu("NVIDIA H200", "9.0", "580.65.06")
Spoil = Callable[[np.ndarray], np.ndarray]


class Machine:
    """The computer.

    Args:
        version: of its TensorRT.
        gpu: what is in it.
        free_bytes: of GPU memory, for the builder.
    """

    def __init__(self, version: str = "11.4.0.106", gpu: Gpu = H200, free_bytes: int = 2**40) -> None:
        self.version, self.gpu, self.free_bytes = version, gpu, free_bytes
        self.spoil: dict[str, Spoil] = {}  # wrong numbers, by tensor name
        self.words_of_failure = "Error Code 2: OutOfMemory (Requested size was {size} bytes.)"
        self.workspaces: list[int] = []  # that a builder was given, in turn
        self.timing_caches: list[bytes] = []  # that a builder was given and took
        self.deserialized = 0
        self.captures = 0
        self.contexts = 0
        self._memory: list[weakref.ref[Tensor]] = []
        self._raw: list[Tensor] = []  # never given back: an address is never another tensor's later
        self._queue: list[Callable[[], object]] = []
        self._recording: list[Callable[[], object]] | None = None
        self._inside = 0
        self.trt = _module(self)

    # ------------------------------------------------------------------------------------------- engines.backends.Device

    @property
    def stream(self) -> int:
        return STREAM

    def tensorrt(self) -> Any:
        return self.trt

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Aligned, and full of what nobody may read."""
        count, size = int(np.prod(shape)), dtype.itemsize
        raw = torch.empty(count + ALIGNMENT_BYTES // size, dtype=dtype)
        self._raw.append(raw)
        raw.fill_(float("nan") if dtype.is_floating_point else 99)
        offset = -raw.data_ptr() % ALIGNMENT_BYTES // size
        block = raw[offset : offset + count].view(shape)
        self._memory.append(weakref.ref(block))
        return block

    def copy(self, destination: Tensor, source: Tensor) -> None:
        assert self._inside, "a copy outside of the stream's order"
        assert destination.shape == source.shape and destination.dtype == source.dtype
        self._submit(lambda: destination.copy_(source))

    @contextlib.contextmanager
    def ordered(self) -> Iterator[None]:
        self._inside += 1
        yield
        self._inside -= 1
        self.synchronize()  # the latest moment at which a GPU may run it; before it, results are not there

    def synchronize(self) -> None:
        assert self._recording is None, "waiting during a capture"
        work, self._queue = self._queue, []
        for item in work:
            item()

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        assert not self._queue, "a capture while work is under way"
        self._recording = []
        try:
            enqueue()
        finally:
            recorded, self._recording = self._recording, None
        assert len(recorded) == 1
        self.captures += 1

        def replay() -> None:
            assert self._inside, "a replay outside of the stream's order"
            for item in recorded:
                self._submit(item)

        return replay

    # ----------------------------------------------------------------------------------------------------------- inside

    def _submit(self, item: Callable[[], object]) -> None:
        assert self._recording is None, "only kernels may be captured"
        self._queue.append(item)

    def launch(self, stream: int, item: Callable[[], object]) -> None:
        assert stream == STREAM, "TensorRT wants a stream that is not the default one, and ours"
        (self._queue if self._recording is None else self._recording).append(item)

    @property
    def recording(self) -> bool:
        return self._recording is not None

    def at(self, address: int, size_bytes: int) -> Tensor:
        """The living memory that begins at an address."""
        living = [block for block in (reference() for reference in self._memory) if block is not None]
        found = [block for block in living if block.data_ptr() == address and block.nbytes >= size_bytes]
        assert found, f"{address:#x} is not the address of {size_bytes} bytes of living memory"
        return found[-1]


class Full(Machine):
    """A GPU without memory left for another tensor."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        raise EngineError("the GPU has too little memory for this batch", "a smaller synth.batch_size, or free the GPU")


# ----------------------------------------------------------------------------------------------------------- the module


class Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        self.ready = True

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class BuilderFlag(enum.Enum):
    """What is left in TensorRT 11: none of FP16, BF16, INT8."""

    TF32, EDITABLE_TIMING_CACHE, DISABLE_TIMING_CACHE = range(3)


class MemoryPoolType(enum.Enum):
    WORKSPACE, TACTIC_DRAM = range(2)


class DataType(enum.Enum):
    FLOAT, HALF, BF16, INT32, INT64 = range(5)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


TYPES = {onnx.TensorProto.FLOAT: DataType.FLOAT, onnx.TensorProto.INT64: DataType.INT64}
TORCH = {DataType.FLOAT: torch.float32, DataType.INT64: torch.int64}


class ParserError:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


class INetworkDefinition:
    def __init__(self) -> None:
        self.model: bytes | None = None


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._errors = network, list[ParserError]()

    def parse(self, model: bytes) -> bool:
        names = {node.op_type for node in onnx.load_model_from_string(model).graph.node}
        if "Loop" in names:
            self._errors.append(ParserError("In node 0 with name: and operator: Loop: unsupported"))
            return False
        self._network.model = bytes(model)
        return True

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:
        self.shapes[input] = [tuple(min), tuple(opt), tuple(max)]


class ITimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> memoryview:
        return memoryview(self.data)


class IBuilderConfig:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.flags, self.profiles = {BuilderFlag.TF32}, list[IOptimizationProfile]()
        self.workspace_bytes, self.cache = 2**62, ITimingCache(b"")

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        assert pool is MemoryPoolType.WORKSPACE
        self.workspace_bytes = pool_size

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache.data and cache.data != _timings(self._machine):
            return False
        self.cache = cache
        return True

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        if any(not small <= usual <= large for small, usual, large in profile.shapes.values()):
            return -1
        self.profiles.append(profile)
        return len(self.profiles) - 1


class Builder:
    def __init__(self, machine: Machine, logger: ILogger) -> None:
        assert logger.ready, "TensorRT asks that ILogger.__init__ be called"
        self._machine, self._logger = machine, logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED, "TensorRT 10 would choose the precision by itself"
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig(self._machine)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> memoryview | None:
        machine = self._machine
        assert network.model is not None
        assert len(config.profiles) == 1, "dynamic inputs need an optimization profile"
        (profile,) = config.profiles
        machine.workspaces.append(config.workspace_bytes)
        if config.workspace_bytes > machine.free_bytes:
            self._logger.log(Severity.ERROR, machine.words_of_failure.format(size=config.workspace_bytes))
            self._logger.log(Severity.ERROR, "Error Code 10: Internal Error (Could not find any implementation for node conv.)")
            return None
        for value in onnx.load_model_from_string(network.model).graph.input:
            fixed = [d.dim_value for d in value.type.tensor_type.shape.dim][1:]
            assert all(list(shape[1:]) == fixed and len(shape) == len(fixed) + 1 for shape in profile.shapes[value.name])
        machine.timing_caches.append(config.cache.data)
        config.cache.data = _timings(machine)
        head = {"version": machine.version, "gpu": machine.gpu[:2], "profile": profile.shapes, "tf32": BuilderFlag.TF32 in config.flags}
        return memoryview(MAGIC + json.dumps(head).encode() + b"\n" + network.model)


class Runtime:
    def __init__(self, machine: Machine, logger: ILogger) -> None:
        assert logger.ready
        self._machine, self._logger = machine, logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        self._machine.deserialized += 1
        magic, head, model = bytes(serialized_engine).split(b"\n", 2)
        assert magic + b"\n" == MAGIC, "these bytes run as code: nobody should have given them to TensorRT"
        facts = json.loads(head)
        if (facts["version"], tuple(facts["gpu"])) != (self._machine.version, self._machine.gpu[:2]):
            self._logger.log(Severity.ERROR, "Error Code 6: API Usage Error (The engine plan file is not compatible with this version)")
            return None
        return ICudaEngine(self._machine, self._logger, facts, model)


class ICudaEngine:
    def __init__(self, machine: Machine, logger: ILogger, facts: dict[str, Any], model: bytes) -> None:
        self._machine, self._logger = machine, logger
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(widened(model), options, providers=["CPUExecutionProvider"])
        graph = onnx.load_model_from_string(model).graph
        self.profile = {name: [tuple(shape) for shape in shapes] for name, shapes in facts["profile"].items()}
        self.tf32 = facts["tf32"]
        self.modes = {value.name: TensorIOMode.INPUT for value in graph.input} | {value.name: TensorIOMode.OUTPUT for value in graph.output}
        self.types = {value.name: TYPES[value.type.tensor_type.elem_type] for value in (*graph.input, *graph.output)}
        self.shapes = {
            value.name: (-1, *(d.dim_value for d in value.type.tensor_type.shape.dim[1:])) for value in (*graph.input, *graph.output)
        }

    @property
    def num_io_tensors(self) -> int:
        return len(self.modes)

    @property
    def num_optimization_profiles(self) -> int:
        return 1

    @property
    def device_memory_size_v2(self) -> int:
        return 4096

    def get_tensor_name(self, index: int) -> str:
        return list(self.modes)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self.modes.get(name, TensorIOMode.NONE)

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.types[name]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert profile_index == 0 and self.modes[name] is TensorIOMode.INPUT
        return self.profile[name]

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> IExecutionContext:
        self._machine.contexts += 1
        return IExecutionContext(self._machine, self._logger, self, strategy)


class IExecutionContext:
    def __init__(self, machine: Machine, logger: ILogger, engine: ICudaEngine, strategy: ExecutionContextAllocationStrategy) -> None:
        self._machine, self._logger, self._engine = machine, logger, engine
        self._own_memory = strategy is not ExecutionContextAllocationStrategy.USER_MANAGED
        self._scratch = (0, 0)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._warm = False  # the first run after a change of shapes does work that a graph must not hold

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % ALIGNMENT_BYTES == 0 and size >= self._engine.device_memory_size_v2
        self._machine.at(memory, size)
        self._scratch = (memory, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._engine.get_tensor_mode(name) is not TensorIOMode.INPUT:
            return self._refuse(f"{name} is not an input")
        small, _, large = self._engine.profile[name]
        if len(shape) != len(small) or any(not a <= b <= c for a, b, c in zip(small, shape, large, strict=True)):
            return self._refuse(f"Set dimensions {shape} of {name} do not fit the optimization profile {small} to {large}")
        self._shapes[name], self._warm = tuple(shape), False
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if self._engine.get_tensor_mode(name) is TensorIOMode.NONE:
            return self._refuse(f"there is no tensor {name}")
        assert memory % ALIGNMENT_BYTES == 0, f"the address of {name} is not aligned"
        self._addresses[name] = memory
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name, mode in self._engine.modes.items() if mode is TensorIOMode.INPUT and name not in self._shapes]

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self.infer_shapes() or set(self._addresses) != set(self._engine.modes):
            return self._refuse("not all shapes and addresses are set")
        assert self._warm or not self._machine.recording, "a capture before the first run with these shapes"
        assert self._own_memory or self._scratch[1], "a context of USER_MANAGED memory without any"
        self._warm = True
        state, this = (dict(self._shapes), dict(self._addresses), self._scratch), weakref.ref(self)

        def kernels() -> None:
            context = this()
            assert context is not None, "the context of a graph is gone"
            assert state == (context._shapes, context._addresses, context._scratch), "the context of a graph has changed"
            context._run()

        self._machine.launch(stream_handle, kernels)
        return True

    def _run(self) -> None:
        engine, machine = self._engine, self._machine
        if not self._own_memory:
            machine.at(*self._scratch)
        batches = {shape[0] for shape in self._shapes.values()}
        assert len(batches) == 1, f"inputs of several batches: {self._shapes}"
        feed = {name: self._spoiled(name, self._memory(name, shape).clone().numpy()) for name, shape in self._shapes.items()}
        names = [name for name, mode in engine.modes.items() if mode is TensorIOMode.OUTPUT]
        for name, value in zip(names, engine.session.run(names, feed), strict=True):
            if engine.tf32:
                value = value * (1 + TF32_ERROR * np.sign(np.sin(np.arange(value.size).reshape(value.shape)))).astype(np.float32)
            self._memory(name, value.shape).copy_(torch.from_numpy(self._spoiled(name, value)))

    def _spoiled(self, name: str, value: np.ndarray) -> np.ndarray:
        spoil = self._machine.spoil.get(name)
        return value if spoil is None else spoil(value)

    def _memory(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """What lies at a tensor's address."""
        dtype = TORCH[self._engine.types[name]]
        count = int(np.prod(shape))
        block = self._machine.at(self._addresses[name], count * dtype.itemsize)
        assert block.dtype == dtype, f"{name} is {dtype} in the plan, {block.dtype} in memory"
        return block.view(-1)[:count].view(shape)

    def _refuse(self, reason: str) -> bool:
        words = f"Error Code 3: API Usage Error ({reason})"
        self._logger.log(Severity.ERROR, words)
        return False


def _timings(machine: Machine) -> bytes:
    return repr((machine.version, machine.gpu)).encode()


def _module(machine: Machine) -> Any:
    """What `import tensorrt` gives on a machine."""
    return SimpleNamespace(
        __version__=machine.version,
        ILogger=ILogger,
        BuilderFlag=BuilderFlag,
        MemoryPoolType=MemoryPoolType,
        DataType=DataType,
        TensorIOMode=TensorIOMode,
        ExecutionContextAllocationStrategy=ExecutionContextAllocationStrategy,
        NetworkDefinitionCreationFlag=NetworkDefinitionCreationFlag,
        OnnxParser=OnnxParser,
        Builder=lambda logger: Builder(machine, logger),
        Runtime=lambda logger: Runtime(machine, logger),
    )


API = (
    ILogger,
    ParserError,
    OnnxParser,
    IOptimizationProfile,
    ITimingCache,
    IBuilderConfig,
    Builder,
    Runtime,
    ICudaEngine,
    IExecutionContext,
    BuilderFlag,
    MemoryPoolType,
    DataType,
    TensorIOMode,
    ExecutionContextAllocationStrategy,
    NetworkDefinitionCreationFlag,
)
