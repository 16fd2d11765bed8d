"""The three stages of a run in their order, and the trained networks read back from it."""

from __future__ import annotations

import re
import time
from typing import Literal

import torch
from torch import nn

from engines import store
from engines.data.longtail import LongTail
from engines.errors import EngineError, Interrupted, NumericsError, UsageError
from engines.networks.guide import Guide
from engines.networks.unet import UNet, parameter_count
from engines.progress import Report, silent
from engines.recipe import Recipe
from engines.store import RunFolder
from engines.training import calibration
from engines.training import guide as guides
from engines.training.diffusion import build_unet, training_schedule
from engines.training.guide import build_guide, guide_stage
from engines.training.loop import Stage, train
from engines.training.source import source_stage
from engines.training.target import target_stage

BYTES_PER_VALUE = 4 * 4 * (store.CHECKPOINTS_KEPT + 1)  # weights, EMA and two moments in float32, once more while one is written


def train_run(run: RunFolder, data: LongTail, device: torch.device, report: Report = silent) -> dict[str, int]:
    """Train source, target and guide, each to its last step, skipping what is complete. The caller holds the run's lock.

    Returns: steps trained by this call, by stage.

    Raises:
        ConflictError: the run was trained on other data.  StorageError, NumericsError, Interrupted: see `loop.train`.
    """
    recipe = run.recipe
    run.keep_classes(data.table())
    data.train.preload(report)
    torch.manual_seed(recipe.seed)  # initial weights
    source, guide = build_unet(recipe, len(data.counts)), build_guide(recipe, data.counts)
    _require_space(run, {"source": parameter_count(source), "target": parameter_count(source), "guide": parameter_count(guide)})
    trained = {"source": _timed(run, source_stage(recipe, data, source, device), device, report)}

    target = build_unet(recipe, len(data.counts))
    target.load_state_dict(source.state_dict())  # theta_tar starts as theta_sou
    trained["target"] = _timed(run, target_stage(recipe, data, source, target, device), device, report)

    guides.warm_start(guide, recipe, data, device)
    trained["guide"] = _timed(run, guide_stage(recipe, data, guide, device), device, report)
    accuracy = run.stage("guide") / "accuracy.json"
    if trained["guide"] or not accuracy.exists():
        schedule = training_schedule(recipe, device)
        splits = {"train": data.train, "test": data.test}  # the test images are reported on; they choose nothing
        by_split = {name: calibration.by_noise(guide, part, schedule, recipe.seed) for name, part in splits.items() if len(part)}
        store.write_json(accuracy, by_split)
    return trained


def choose_device(name: str) -> torch.device:
    """The device asked for, or nothing: only "auto" chooses. Raises UsageError for an unknown name, EngineError where it is missing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"there is no device named {name!r}", "--device auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EngineError(
            f"torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices, not {name}",
            "--device cpu, or install a CUDA build of torch",
        )
    return device


def load_unet(run: RunFolder, model: Literal["target", "source"] = "target") -> UNet:
    """The EMA weights of a trained U-Net, in evaluation mode on the CPU. Raises UsageError where it is not trained."""
    unet = build_unet(run.recipe, len(run.classes()["names"]))
    _load_ema(run, model, unet)
    return unet


def load_guide(run: RunFolder) -> Guide:
    """The EMA weights and prototypes of the trained guide. Raises UsageError where it is not trained."""
    table = run.classes()
    guide = build_guide(run.recipe, torch.tensor(table["counts"]).numpy())
    _load_ema(run, "guide", guide)
    return guide


def training_steps(recipe: Recipe) -> dict[str, int]:
    """Steps of each stage."""
    return {"source": recipe.source.train_steps, "target": recipe.target.train_steps, "guide": recipe.guide.train_steps}


def _require_space(run: RunFolder, values: dict[str, int]) -> None:
    """Refuse where the disk cannot hold what the unfinished stages still write; what they hold already counts as theirs."""
    unfinished = [stage for stage, steps in training_steps(run.recipe).items() if store.newest_step(run.stage(stage)) < steps]
    held_bytes = sum(file.stat().st_size for stage in unfinished for file in run.stage(stage).rglob("*.safetensors"))
    store.require_space(run.path, BYTES_PER_VALUE * sum(values[stage] for stage in unfinished) - held_bytes)


def _timed(run: RunFolder, stage: Stage, device: torch.device, report: Report) -> int:
    started = time.perf_counter()
    try:
        steps = train(stage, run.stage(stage.name), run.recipe.seed, device, report)
    except (Interrupted, NumericsError):  # not StorageError: where a checkpoint could not be written, this cannot either, and would hide it
        run.add_cost(f"train.{stage.name}", time.perf_counter() - started)
        raise
    run.add_cost(f"train.{stage.name}", time.perf_counter() - started)
    return steps


def _load_ema(run: RunFolder, stage: str, network: nn.Module) -> None:
    found = store.load_checkpoint(run.stage(stage))
    steps = training_steps(run.recipe)[stage]
    if found is None or found.step < steps:
        state = "is not trained" if found is None else f"stands at step {found.step:,} of {steps:,}"
        raise UsageError(f"the {stage} of {run.path} {state}", f"diffrc train --run {run.path}")
    network.load_state_dict(dict(found.groups["ema"]))
    network.eval()
