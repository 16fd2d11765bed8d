"""One way to evaluate a network, in a process of its own: what it takes to load, to run, and in memory, is nobody else's."""

from __future__ import annotations

import contextlib
import importlib
import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from engines.backends import choice, gate
from engines.backends.base import Engine, EngineCard, Precision, example_input
from engines.backends.choice import Build
from engines.backends.device import exact_float32, processors
from engines.backends.fused import FusedEngine, read_fused
from engines.backends.torch_engine import TorchEngine, torch_card
from engines.benchmark import subject
from engines.benchmark.peaks import Peak, machine, measure_peaks, synchronize
from engines.diffusion.guidance import prototype_guidance
from engines.diffusion.noise import batch_noise, image_key
from engines.diffusion.sampler import Denoiser, Guidance, GuidedStep, sample, within
from engines.diffusion.schedule import respace
from engines.errors import DiffRCError, EngineError
from engines.progress import peak_memory_bytes
from engines.synthesis.maker import denoiser

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

Mode = Literal["latency", "throughput"]
Work = Callable[[], object]

REFERENCE = "reference.safetensors"
END_SECONDS = 10.0  # that a process has to end by itself


@dataclass(frozen=True)
class Arm:
    """One way to evaluate a network.

    Attributes:
        runtime: "torch", our engine, "compiled", the same under torch.compile, or the kind of another engine; "autocast" and
            "diffusers" are what a script does: torch's autocast around the network, and diffusers' own class with its weights.
        mode: "latency": one evaluation at a time on all threads; "throughput": as many side by side as there are processors, one
            thread each, which is how images are synthesized on a CPU.
        guided: "" = evaluations of the network alone; "plain" = whole guided steps in a loop of torch as a script has it, "loop" = in
            ours with torch's guide, "fused" = of one graph.
        threads: how many processors may be used; 0 = all.
    """

    runtime: str
    precision: Precision
    mode: Mode = "latency"
    guided: Literal["", "plain", "loop", "fused"] = ""
    threads: int = 0
    device: str = "cpu"
    sampling_steps: int = 4  # of a measured piece of a guided trajectory

    @property
    def name(self) -> str:
        """As a table has it."""
        words = {"": "", "plain": ", plain", "loop": " + torch guide", "fused": ", fused"}
        return f"{self.runtime} {self.precision}{words[self.guided]}"


class Player(Protocol):
    """Who takes turns."""

    def time(self, batch: int, seconds: float) -> list[float]:
        """Milliseconds an image of each of the evaluations (or guided steps) that were made for about so many seconds, one at least."""
        ...


# ---------------------------------------------------------------------------------------------------------- the parent's


class Process:
    """An arm at work in a process of its own, as its parent sees it: `Worker`'s methods, one at a time.

    Raises what the worker raised where that is a DiffRCError; EngineError where the process has ended by itself.
    """

    def __init__(self, arm: Arm, folder: Path) -> None:
        self.arm = arm
        spawn = multiprocessing.get_context("spawn")  # nothing of the parent's memory, threads and runtimes
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(theirs, arm, folder), name=arm.name, daemon=True)
        self._process.start()
        theirs.close()

    def _ask(self, method: str, *arguments: object) -> Any:
        try:
            self._pipe.send((method, arguments))
            kind, value = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(END_SECONDS)
            remedy = "the other engines can be measured; diffrc synth --engine torch runs without this one"
            raise EngineError(f"the process of {self.arm.name} ended with code {self._process.exitcode}", remedy) from None
        if kind == "failed":
            problem, remedy = value
            raise EngineError(problem, remedy)
        assert kind == "done", f"{self.arm.name}: {value}"
        return value

    def load(self, batch: int) -> float:
        """See `Worker.load`."""
        return float(self._ask("load", batch))

    def time(self, batch: int, seconds: float) -> list[float]:
        """See `Worker.time`."""
        found: list[float] = self._ask("time", batch, seconds)
        return found

    def memory(self) -> tuple[int, int]:
        """See `Worker.memory`."""
        before, peak = self._ask("memory")
        return before, peak

    def one_step_error(self) -> float:
        """See `Worker.one_step_error`."""
        return float(self._ask("one_step_error"))

    def peaks(self, seconds: float) -> tuple[dict[str, Any], list[Peak]]:
        """See `Worker.peaks`."""
        about, found = self._ask("peaks", seconds)
        return about, found

    def close(self) -> None:
        """End the process, by force where it does not end by itself."""
        self._pipe.close()
        self._process.join(END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def working(arms: Sequence[Arm], folder: Path) -> Iterator[list[Process]]:
    """Processes of some arms, started together, ended with the block."""
    processes: list[Process] = []
    try:
        processes += [Process(arm, folder) for arm in arms]
        yield processes
    finally:
        for process in processes:
            process.close()


# ----------------------------------------------------------------------------------------------------------- the child's


def serve(pipe: Connection, arm: Arm, folder: Path) -> None:
    """What the process runs: answers until the parent has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: it is the parent's to end it
    os.dup2(2, 1)  # a result on stdout is the parent's alone, whatever runtimes print
    if arm.threads:
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: arm.threads]))
    warnings.simplefilter("ignore")  # of other libraries, a process each
    worker = Worker(arm, folder)
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("done", getattr(worker, method)(*arguments)))
        except DiffRCError as error:
            pipe.send(("failed", (error.problem, error.remedy)))
        except Exception:  # told to the parent, whose assertion fails with it
            pipe.send(("broken", traceback.format_exc()))


class Worker:
    """An arm at work."""

    def __init__(self, arm: Arm, folder: Path) -> None:
        self.arm, self.folder = arm, folder
        self.device = torch.device(arm.device)
        self.side_by_side = processors() if arm.mode == "throughput" else 1
        torch.set_num_threads(1 if arm.mode == "throughput" else processors())
        self._before_bytes = peak_memory_bytes()
        self._works: dict[int, list[Work]] = {}
        self._engine: Engine | None = None
        self._step: FusedEngine | None = None

    def load(self, batch: int) -> float:
        """Seconds from the files to the first result: reading, compiling, the load-time self-test, one evaluation; torch is imported."""
        started = time.perf_counter()
        if self.arm.guided:
            self._sampling(batch, 1)()
        else:
            self._evaluation(batch)()
        synchronize(self.device)
        return time.perf_counter() - started

    def time(self, batch: int, seconds: float) -> list[float]:
        """Milliseconds an image of the whole machine, see `Player`: with W side by side, an evaluation's own time divided by W."""
        if batch not in self._works:
            steps = self.arm.sampling_steps
            self._works[batch] = [
                self._sampling(batch, steps) if self.arm.guided else self._evaluation(batch) for _ in range(self.side_by_side)
            ]
        per_call = batch * self.side_by_side * (self.arm.sampling_steps if self.arm.guided else 1)
        return [1000 * spent / per_call for spent in timed(self._works[batch], seconds, self.pool, lambda: synchronize(self.device))]

    def memory(self) -> tuple[int, int]:
        """Peak bytes of this process before it loaded anything but torch, and up to now."""
        return self._before_bytes, peak_memory_bytes()

    def one_step_error(self) -> float:
        """The gate's, against what torch gave in the parent."""
        batch = subject.read_table(self.folder)["max_batch"]
        engine = subject.Capped(self._engine_for(batch), batch)
        reference = subject.Recorded(self.folder / REFERENCE, engine.card)
        return gate.one_step_error(engine, reference, engine.card.max_batch)

    def peaks(self, seconds: float) -> tuple[dict[str, Any], list[Peak]]:
        """What the machine is and can do at best."""
        return machine(self.device), measure_peaks(self.device, seconds)

    @cached_property
    def pool(self) -> ThreadPoolExecutor | None:
        """Threads for what runs side by side, as synthesis has them."""
        if self.side_by_side == 1:
            return None
        return ThreadPoolExecutor(self.side_by_side, "bench", initializer=torch.set_num_threads, initargs=(1,))

    def _engine_for(self, batch: int) -> Engine:
        """The network on its runtime; the first batch size asked for is the one it is loaded for."""
        if self._engine is None or (self.arm.runtime == "compiled" and self._engine.card.max_batch != batch):
            self._engine = self._open(batch)
        return self._engine

    def _open(self, batch: int) -> Engine:
        arm = self.arm
        if arm.runtime in ("torch", "compiled"):
            unet, table = subject.read_unet(self.folder).to(self.device), subject.read_table(self.folder)
            compiled = arm.runtime == "compiled"  # it runs batches of one size
            return TorchEngine(unet, table["timesteps"], batch if compiled else table["max_batch"], "", arm.precision, compiled)
        if arm.runtime in ("autocast", "diffusers"):
            return PlainTorch(self.folder, arm.runtime == "diffusers", arm.precision, self.device)
        build = Build(arm.runtime, arm.precision)  # type: ignore[arg-type]  # what is neither of the two is a kind of engine
        threads, device = 1 if arm.mode == "throughput" else 0, choice.device_of(build, arm.device)
        return choice.load(subject.read_place(self.folder, build), str(build), threads, batch, device)

    def _evaluation(self, batch: int) -> Work:
        engine = self._engine_for(batch)
        x, t, y = example_input(engine.card, batch, engine.card.timesteps // 2)
        x, t, y = x.to(self.device), t.to(self.device), None if y is None else y.to(self.device)
        return lambda: engine(x, t, y)

    def _sampling(self, batch: int, steps: int) -> Work:
        """A guided trajectory of so few steps, spread over all t, so that each costs what a step of a long one does."""
        recipe, device = subject.read_recipe(self.folder), self.device
        synth, shape = recipe.synth, (recipe.data.image_channels, recipe.data.image_size_px, recipe.data.image_size_px)
        schedule = respace(subject.schedule_of(recipe), min(steps, recipe.diffusion.steps)).to(device)
        y = torch.arange(batch, device=device) % subject.read_table(self.folder)["classes"]
        keys = [image_key(0, int(k), i) for i, k in enumerate(y)]
        guidance: Guidance | None = None
        guided_step: GuidedStep | None = None
        if self.arm.guided == "fused":
            guided_step = self._step_for(batch).bind(schedule, y, synth.eta, synth.guidance_scale, synth.guidance_scale_max)
        else:
            rules = synth.scale_rule, synth.gradient_norm, synth.direction
            guidance = prototype_guidance(self._guide.log_probs, y, synth.guidance_scale, synth.guidance_scale_max, *rules)
        always = all(within(synth.guidance_interval, t) for t in schedule.timesteps.tolist())
        denoise: Denoiser = _never
        if not (guided_step and always):
            denoise = denoiser(self._engine_for(batch), y)
        plain, half = self.arm.guided == "plain", self.arm.runtime == "autocast"

        def noise(step: int) -> Tensor:
            return torch.randn(batch, *shape, device=device) if plain else batch_noise(keys, step, shape).to(device)

        def work() -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=half), torch.no_grad():
                return sample(
                    denoise,
                    schedule,
                    noise,
                    guidance,
                    synth.sampler,
                    synth.eta,
                    synth.step_unit,
                    synth.clip_denoised,
                    guided_step=guided_step,
                    interval=synth.guidance_interval,
                )

        return work

    def _step_for(self, batch: int) -> FusedEngine:
        if self._step is None:
            threads = 1 if self.arm.mode == "throughput" else 0
            runtime, precision = self.arm.runtime, self.arm.precision
            assert runtime in ("onnx", "openvino") and precision != "fp16", "steps are made for these alone"
            file = read_fused(self.folder / subject.STEP, runtime, precision)  # type: ignore[arg-type]
            self._step = FusedEngine(*file, f"the step in one graph on {runtime} {precision}", threads, batch)
        return self._step

    @cached_property
    def _guide(self) -> Any:
        guide = subject.read_guide(self.folder)
        assert guide is not None, "guided arms are only for what has a guide"
        return guide.to(self.device)


class PlainTorch:
    """See `Engine`: the network as a script of thirty lines would run it, in torch or in diffusers' class, bf16 by autocast."""

    def __init__(self, folder: Path, diffusers: bool, precision: Precision, device: torch.device) -> None:
        unet = subject.read_unet(folder)
        table = subject.read_table(folder)
        self.card: EngineCard = torch_card(unet, table["timesteps"], table["max_batch"])
        self._device, self._half = device, precision == "bf16"
        if diffusers:
            self._network = _diffusers_network(folder, device)
        else:
            self._network = unet.to(device)

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """See `Engine.__call__`."""
        device = self._device
        with exact_float32(device), torch.autocast(device.type, torch.bfloat16, enabled=self._half):
            out: Tensor = self._network(x.to(device), t.to(device), None if y is None else y.to(device))
        return out.float().to(x.device)


def _diffusers_network(folder: Path, device: torch.device) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """diffusers' own class with the same weights."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # it imports a client of a hub, which must not ask the network
    library = importlib.import_module("diffusers")
    library.utils.logging.set_verbosity_error()
    network = library.UNet2DModel.from_pretrained(folder / "diffusers" / "unet", low_cpu_mem_usage=False).eval().to(device)
    return lambda x, t, y: network(x, t, class_labels=y, return_dict=False)[0]


def _never(x: Tensor, t: Tensor) -> Tensor:
    raise AssertionError("a step in one graph asks for no evaluation")


def timed(works: Sequence[Work], seconds: float, pool: ThreadPoolExecutor | None = None, finish: Work = lambda: None) -> list[float]:
    """Wall-clock seconds of every call, for about so many seconds in all, at least one call of each work.

    Args:
        works: run side by side, a thread of the pool each; without a pool, the only one runs here.
        finish: called after each call, and timed with it: waits for a device.
    """
    assert pool is not None or len(works) == 1

    def repeat(work: Work) -> list[float]:
        spent: list[float] = []
        began = time.perf_counter()
        while not spent or time.perf_counter() - began < seconds:
            started = time.perf_counter()
            work()
            finish()
            spent.append(time.perf_counter() - started)
        return spent

    if pool is None:
        return repeat(works[0])
    together = threading.Barrier(len(works))  # so that each has a thread of its own, and none begins alone

    def begin(work: Work) -> list[float]:
        together.wait()
        return repeat(work)

    return [spent for result in [pool.submit(begin, work) for work in works] for spent in result.result()]


def percentile(samples: Sequence[float], share: float) -> float:
    """The value below which so large a share of the samples lies, 0..1, between two of them in proportion."""
    ordered = sorted(samples)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
