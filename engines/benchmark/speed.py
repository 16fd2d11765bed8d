"""Every engine that runs here beside torch, and beside diffusers where it is installed, on one network, turn by turn in the same minutes.

Each is a process of its own, and all of them take turns, so that a busy moment of the machine meets all; ratios are taken within a turn.
"""

from __future__ import annotations

import datetime
import importlib.util
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.backends.base import example_input, package_versions
from engines.backends.choice import BUILDS, Build
from engines.backends.device import processors
from engines.backends.torch_engine import TorchEngine
from engines.benchmark import subject as subjects
from engines.benchmark.peaks import Peak, operations_of
from engines.benchmark.subject import Subject
from engines.benchmark.worker import REFERENCE, Arm, Mode, Player, Process, working
from engines.errors import EngineError, UsageError
from engines.networks import diffusers_folder
from engines.networks.unet import parameter_count
from engines.progress import Report, silent

PACKAGES = ("diffrc", "torch", "numpy", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "diffusers")
DIFFUSERS = "diffusers fp32"
EXPORT_SECONDS, START_SECONDS, COMPILE_SECONDS = 20.0, 4.0, 90.0  # of an export, a process, a batch size; for the estimate alone
GUIDED_SHARE = 1.5  # of a guided step beside an evaluation, likewise
ESTIMATE_BATCH = 8


@dataclass(frozen=True)
class Settings:
    """What is measured, and how long.

    Attributes:
        runtimes: of `Arm`, that are measured beside torch in float32; none = all.
        batches: batch sizes, in rising order.
        modes: see `Arm`.
        turns: timed turns of every engine, after one that is not timed.
        visit_seconds: of an engine's turn; one evaluation at least.
        threads: processors that may be used; 0 = all.
        guided: whole guided steps as well.
        compiled: torch.compile as well, which takes minutes for each batch size.
        sampling_steps: of a measured piece of a guided trajectory.
    """

    batches: tuple[int, ...] = (1, 8, 32)
    modes: tuple[Mode, ...] = ("latency", "throughput")
    turns: int = 7
    visit_seconds: float = 1.0
    peak_seconds: float = 1.0
    threads: int = 0
    device: str = "cpu"
    guided: bool = False
    compiled: bool = False
    sampling_steps: int = 4
    runtimes: tuple[str, ...] = ()

    def wants(self, arm: Arm) -> bool:
        """Whether an arm is measured; what others are compared with always is."""
        return not self.runtimes or arm.runtime in self.runtimes or (arm.runtime, arm.precision) == ("torch", "fp32")

    def __post_init__(self) -> None:
        assert self.batches and list(self.batches) == sorted(set(self.batches)) and self.batches[0] > 0 and self.turns > 0 and self.modes

    @property
    def processors(self) -> int:
        """That may be used."""
        return self.threads or processors()


QUICK = Settings(batches=(8,), modes=("throughput",), turns=3, visit_seconds=0.3, peak_seconds=0.3, sampling_steps=2)


@dataclass(frozen=True)
class Row:
    """What one arm took at one batch size.

    Attributes:
        turns_ms: milliseconds an image of every evaluation, or of every guided step, by turn.
        start_bytes, peak_bytes: the most memory of its process before it loaded the engine, and up to the end of this batch size.
        one_step_error: the gate's, of the network alone; None for guided steps.
    """

    arm: Arm
    batch: int
    turns_ms: tuple[tuple[float, ...], ...]
    first_run_seconds: float
    start_bytes: int
    peak_bytes: int
    one_step_error: float | None


@dataclass(frozen=True)
class Speed:
    """Everything that was measured, and of what; `report.document` makes the rest of it."""

    settings: Settings
    network: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    peaks: tuple[Peak, ...]
    rows: tuple[Row, ...]
    left_out: dict[str, str] = field(default_factory=dict)  # engine -> why
    began: str = ""  # UTC
    seconds: float = 0.0


def measure(subject: Subject, settings: Settings, report: Report = silent, builds: Sequence[Build] = BUILDS) -> Speed:
    """Measure every engine that runs here. Files are made in a temporary folder, which goes in the end.

    Raises:
        UsageError: guided steps were asked for and there is no guide.
        EngineError: torch itself could not be measured.
    """
    require(subject, settings)
    builds = [build for build in builds if not settings.runtimes or build.kind in settings.runtimes]
    started, began = time.perf_counter(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="diffrc-bench-") as name:
        folder = Path(name)
        report("prepare", 0, 3, {})
        left_out = _prepare(folder, subject, settings, builds)
        report("prepare", 1, 3, {})
        with working([Arm("torch", "fp32", threads=settings.threads, device=settings.device)], folder) as (process,):
            machine, peaks = process.peaks(settings.peak_seconds)
        report("prepare", 3, 3, {})
        for mode in settings.modes:
            rows += _play(folder, _arms(mode, settings, left_out, builds), settings, left_out, mode, report, rows)
        if settings.guided:
            had = [build for build in builds if str(build) not in left_out and settings.device == "cpu"]
            report("prepare the guided steps", 0, 1, {})
            for build, why in subjects.provide_steps(folder, subject, had, settings.batches[-1]).items():
                left_out[f"{build}, fused"] = why
            report("prepare the guided steps", 1, 1, {})
            rows += _play(folder, _guided_arms(settings, left_out, builds), settings, left_out, "guided", report, rows)
    if not any(row.arm.runtime == "torch" for row in rows):
        raise EngineError(f"torch could not be measured: {'; '.join(left_out.values())}", "--batch with smaller batches, say")
    versions = package_versions(PACKAGES)
    seconds = time.perf_counter() - started
    return Speed(settings, facts(subject), machine, versions, tuple(peaks), tuple(rows), left_out, began, seconds)


def require(subject: Subject, settings: Settings) -> None:
    """Raises UsageError where the network has not what was asked for."""
    if settings.guided and subject.guide is None:
        raise UsageError("the guide is not trained, so no guided step can be measured", "diffrc train; or leave --guided out")
    if settings.guided and subject.recipe.synth.sampler == "dpmpp_2m":
        raise UsageError("--guided measures steps of ddpm and ddim", "--set synth.sampler=ddim")


def facts(subject: Subject) -> dict[str, Any]:
    """What the measured network is."""
    unet, synth = subject.unet, subject.recipe.synth
    engine = TorchEngine(unet, subject.recipe.diffusion.steps, 1)
    x, t, y = example_input(engine.card, 1, 0)
    steps = len(subject.recipe.sampling_timesteps())
    return {
        "name": subject.name,
        "weights": subject.weights,
        "parameters": parameter_count(unet),
        "guide_parameters": parameter_count(subject.guide) if subject.guide else 0,
        "operations_per_image": operations_of(lambda: unet(x, t, y)),
        "image": list(engine.card.shape),
        "out_channels": engine.card.out_channels,
        "sampler": synth.sampler,
        "steps": steps,
        "evaluations": steps * (2 if synth.classifier_free_scale else 1),
    }


def estimate_seconds(subject: Subject, settings: Settings, builds: Sequence[Build] = BUILDS) -> float:
    """About how long `measure` takes, going by a few evaluations made now and what is usual for the rest."""
    batch = min(ESTIMATE_BATCH, settings.batches[-1])
    engine = TorchEngine(subject.unet, subject.recipe.diffusion.steps, batch)
    inputs = example_input(engine.card, batch, 0)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        engine(*inputs)
        times.append(time.perf_counter() - started)
    exported = subject.published is not None and subject.published.is_file()
    builds = [build for build in builds if build.kind != "tensorrt" or exported]  # nothing else can have it
    return expected_seconds(min(times) / batch, builds, settings, exported)


def expected_seconds(image_seconds: float, builds: Sequence[Build], settings: Settings, exported: bool) -> float:
    """The estimate from the seconds of an image's evaluation in torch, as if no engine were faster."""
    visits, abreast = settings.turns + 1, settings.processors if "throughput" in settings.modes else 1
    total = (0.0 if exported else EXPORT_SECONDS) + START_SECONDS + 6 * settings.peak_seconds
    for i, mode in enumerate(settings.modes):
        arms = len(_arms(mode, settings, {}, builds))
        side = settings.processors if mode == "throughput" else 1
        compiled = settings.compiled and len(settings.batches)
        total += arms * START_SECONDS + compiled * COMPILE_SECONDS
        total += sum(arms * visits * max(settings.visit_seconds, batch * side * image_seconds) for batch in settings.batches)
        total += 0.0 if i else 3 * (3 + settings.batches[-1]) * image_seconds * (arms + 1)  # the reference, and each one's error
    if settings.guided:
        arms, step = len(_guided_arms(settings, {}, builds)), GUIDED_SHARE * image_seconds * settings.sampling_steps * abreast
        total += EXPORT_SECONDS + arms * START_SECONDS
        total += sum(arms * visits * max(settings.visit_seconds, batch * step) for batch in settings.batches)
    return total


def candidates(mode: Mode, settings: Settings, builds: Sequence[Build] = BUILDS) -> list[str]:
    """What `measure` tries in a mode, by name; what cannot run here it leaves out and says why."""
    return [arm.name for arm in _arms(mode, settings, {}, builds)]


def take_turns(players: Sequence[Player], batch: int, turns: int, seconds: float) -> list[list[list[float]]]:
    """By player, by turn: milliseconds of its evaluations. One turn goes before and is not kept; every other turn goes backward."""
    taken: list[list[list[float]]] = [[] for _ in players]
    for turn in range(turns + 1):
        order = range(len(players)) if turn % 2 else reversed(range(len(players)))
        for i in order:
            samples = players[i].time(batch, seconds)
            taken[i] += [samples] if turn else []
    return taken


# ------------------------------------------------------------------------------------------------------------- the work


def _prepare(folder: Path, subject: Subject, settings: Settings, builds: Sequence[Build]) -> dict[str, str]:
    """Write what the processes read. Returns: what cannot be measured, and why."""
    max_batch = settings.batches[-1]
    subjects.write(folder, subject, max_batch)
    subjects.write_reference(folder / REFERENCE, subject, max_batch)
    refused = subjects.provide_engines(folder, subject, builds, max_batch)
    left_out = {str(build): why for build, why in refused.items()}
    if settings.runtimes and "diffusers" not in settings.runtimes:
        return left_out
    if importlib.util.find_spec("diffusers") is None:
        left_out[DIFFUSERS] = "diffusers is not installed"
    else:
        try:
            diffusers_folder.write(folder / "diffusers", subject.unet, subject.recipe)
        except UsageError as error:
            left_out[DIFFUSERS] = error.problem
    return left_out


def _arms(mode: Mode, settings: Settings, left_out: dict[str, str], builds: Sequence[Build]) -> list[Arm]:
    """Torch first: it is what the others are compared with."""
    common: dict[str, Any] = {"mode": mode, "threads": settings.threads, "device": settings.device}
    arms = [Arm("torch", "fp32", **common), Arm("diffusers", "fp32", **common), Arm("autocast", "bf16", **common)]
    arms += [Arm("torch", "bf16", **common), *([Arm("compiled", "bf16", **common)] if settings.compiled else [])]
    arms += [Arm(build.kind, build.precision, **common) for build in builds]
    return [arm for arm in arms if arm.name not in left_out and settings.wants(arm)]


def _guided_arms(settings: Settings, left_out: dict[str, str], builds: Sequence[Build]) -> list[Arm]:
    """A script's loops, one batch at a time on all threads; ours as they synthesize."""
    common: dict[str, Any] = {"threads": settings.threads, "device": settings.device, "sampling_steps": settings.sampling_steps}
    mode: Mode = "throughput" if "throughput" in settings.modes else "latency"
    arms = [Arm("torch", "fp32", guided="plain", **common), Arm("autocast", "bf16", guided="plain", **common)]
    arms += [Arm(build.kind, build.precision, mode, "loop", **common) for build in builds if str(build) not in left_out]
    if settings.device == "cpu":  # steps in one graph are made for a CPU
        arms += [Arm(build.kind, build.precision, mode, "fused", **common) for build in builds if str(build) not in left_out]
    return [arm for arm in arms if arm.guided == "plain" or (settings.wants(arm) and arm.name not in left_out)]


def _play(
    folder: Path, arms: Sequence[Arm], settings: Settings, left_out: dict[str, str], what: str, report: Report, before: Sequence[Row]
) -> list[Row]:
    """Start the arms, let them take turns at every batch size, and end them. What fails is left out, with its reason."""
    rows: list[Row] = []
    errors = {(row.arm.runtime, row.arm.precision): row.one_step_error for row in before}
    jobs = [f"{what}, batch {batch}" for batch in settings.batches]
    with working(arms, folder) as processes:
        playing: list[Process] = []
        first_run: dict[str, float] = {}
        for process in processes:
            try:
                first_run[process.arm.name] = process.load(settings.batches[0])
                playing.append(process)
            except EngineError as error:
                left_out[f"{process.arm.name} ({what})"] = error.problem
        found: list[tuple[Process, int, list[list[float]], tuple[int, int]]] = []
        for job, batch in zip(jobs, settings.batches, strict=True):
            turns = [_Counted(process, job, settings.turns, report if i == 0 else silent) for i, process in enumerate(playing)]
            taken = take_turns(turns, batch, settings.turns, settings.visit_seconds)
            report(job, settings.turns + 1, settings.turns + 1, {})
            left_out |= {f"{turn.player.arm.name} ({job})": turn.failed for turn in turns if turn.failed}
            playing = [turn.player for turn in turns if not turn.failed]
            measured = [spent for turn, spent in zip(turns, taken, strict=True) if not turn.failed]
            found += [(process, batch, spent, process.memory()) for process, spent in zip(playing, measured, strict=True)]
        for process in playing:
            key = process.arm.runtime, process.arm.precision
            if not process.arm.guided and key not in errors:
                errors[key] = process.one_step_error()
    for process, batch, spent, memory in found:
        arm = process.arm
        if process not in playing:  # it failed at a larger batch: its parity was never asked for
            continue
        error_of_one = None if arm.guided else errors[arm.runtime, arm.precision]
        rows.append(Row(arm, batch, tuple(map(tuple, spent)), first_run[arm.name], *memory, error_of_one))
    return rows


class _Counted:
    """A player whose turns are reported; where it fails, the others go on."""

    def __init__(self, player: Process, job: str, turns: int, report: Report) -> None:
        self.player, self.failed = player, ""
        self._job, self._turns, self._report, self._done = job, turns, report, 0

    def time(self, batch: int, seconds: float) -> list[float]:
        """See `Player`; nothing once it has failed."""
        self._report(self._job, self._done, self._turns + 1, {})
        self._done += 1
        if not self.failed:
            try:
                return self.player.time(batch, seconds)
            except EngineError as error:
                self.failed = error.problem
        return []
