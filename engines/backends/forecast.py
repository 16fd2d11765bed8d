"""What an export would take: which engines still fit, and seconds and bytes of those that do not; nothing is written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engines.backends import choice, gate, guided
from engines.backends.base import engine_path, example_input
from engines.backends.choice import Build
from engines.backends.export import Model, builds_of_recipe, current_card, file_opset, onnx_path
from engines.backends.torch_engine import TorchEngine
from engines.diffusion.schedule import make_schedule
from engines.errors import EngineError
from engines.networks.unet import parameter_count
from engines.recipe import Recipe
from engines.store import RunFolder

TRACE_SECONDS, GUIDED_SECONDS = 10.0, 20.0  # of making an ONNX file of the network, of making the guided step; usual, not measured
TIMED_EVALUATIONS = 3


@dataclass(frozen=True)
class BuildForecast:
    """One engine file.

    Attributes:
        current: it is there and still fits, so that it is kept.
        guided: a whole guided step is exported for it too.
        seconds_left: about; the gate as the network's measured speed in torch has it, everything else as is usual.
        disk_bytes: of the file, before the old one goes.
    """

    build: Build
    path: Path
    current: bool
    guided: bool
    seconds_left: float
    disk_bytes: int


def forecast(run: RunFolder, model: Model, builds: Sequence[Build] = ()) -> list[BuildForecast]:
    """What `export_run` would do. Raises UsageError where a stage is not trained, EngineError where a build cannot run here."""
    from engines.training.stages import load_unet

    recipe, network = run.recipe, onnx_path(run, model)
    unet = load_unet(run, model)
    seconds = image_seconds(TorchEngine(unet, recipe.diffusion.steps, recipe.export.max_batch), recipe.synth.batch_size)
    found = []
    for build in builds or builds_of_recipe(recipe):
        choice.require(build, file_opset(recipe.export, build))
        device = choice.device_of(build, recipe.synth.device)
        current = current_card(network, unet, recipe, build, device) is not None
        steps = guided.is_wanted(recipe, build) and device.type == "cpu"
        stepped = steps and _has_step(network, recipe, build)
        left = (0.0 if current else TRACE_SECONDS + gate_seconds(recipe, seconds)) + (GUIDED_SECONDS if steps and not stepped else 0.0)
        bytes_a_value = 4 if build.precision == "fp32" or build.kind == "openvino" else 2
        size = 0 if current else bytes_a_value * (parameter_count(unet) + recipe.diffusion.steps * 4 * recipe.unet.model_channels)
        found.append(BuildForecast(build, engine_path(network, *build), current, steps, left, size))
    return found


def _has_step(network: Path, recipe: Recipe, build: Build) -> bool:
    try:
        return guided.published(network, recipe, build) is not None
    except EngineError:  # damaged: made anew
        return False


def image_seconds(engine: TorchEngine, batch: int) -> float:
    """Seconds of an image's evaluation by torch, the best of three batches."""
    batch = min(batch, engine.card.max_batch)
    inputs = example_input(engine.card, batch, 0)
    times = []
    with torch.no_grad():
        for _ in range(TIMED_EVALUATIONS):
            started = time.perf_counter()
            engine(*inputs)
            times.append(time.perf_counter() - started)
    return min(times) / batch


def gate_seconds(recipe: Recipe, seconds: float) -> float:
    """Seconds of `gate.measure` for an engine that is as fast as torch, from the seconds of an image's evaluation."""
    largest, batch = recipe.export.max_batch, recipe.synth.batch_size
    steps = gate.trajectory_steps(make_schedule(recipe.diffusion.noise_schedule, recipe.diffusion.steps))
    once = 3 * sum({1, min(2, largest), batch, largest}) + (gate.TIMED_TURNS + 1) * batch
    return 2 * seconds * (once + steps * gate.trajectory_images(2 * seconds, steps))
