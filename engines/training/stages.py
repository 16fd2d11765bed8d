"""The three stages of a run in their order, and the trained networks read back from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from engines import store
from engines.data.batches import torch_generator
from engines.data.images import Indices
from engines.data.longtail import LongTail
from engines.errors import Interrupted, NumericsError, UsageError
from engines.networks.guide import Guide
from engines.networks.unet import UNet, parameter_count
from engines.progress import Report, silent
from engines.recipe import Recipe
from engines.store import RunFolder
from engines.training import calibration, reuse
from engines.training import guide as guides
from engines.training.diffusion import build_unet, training_schedule
from engines.training.distributed import ALONE, World
from engines.training.guide import build_guide, guide_stage
from engines.training.loop import Stage, is_complete, train
from engines.training.reuse import StageStatus
from engines.training.sinks import Sinks
from engines.training.source import source_stage
from engines.training.target import target_stage

BYTES_PER_VALUE = 4 * (store.CHECKPOINTS_KEPT + 1)  # in float32, in each checkpoint, and once more while one is written


def train_run(
    run: RunFolder,
    data: LongTail,
    device: torch.device,
    report: Report = silent,
    tell: Callable[[str], None] = lambda _: None,
    sinks: Sinks | None = None,
    world: World = ALONE,
) -> dict[str, int]:
    """Train source, target and guide, each to its last step, skipping what is complete. The caller holds the run's lock.

    A stage that was trained with other settings is kept aside and trains again, or comes back from there: see `reuse`.

    Args:
        tell: hears such sentences before anything is trained.
        sinks: are given the figures and sample grids, beside the run folder.
        world: this process and those that train with it; the first one writes, and holds the lock for all.

    Returns: steps trained by this call, by stage.

    Raises:
        ConflictError: the run was trained on other data.
        DataError, UsageError: the file source.pretrained is unusable, or does not fit the recipe.
        StorageError, NumericsError, Interrupted: see `loop.train`.
    """
    recipe = run.recipe
    data.train.preload(report)
    source, guide = new_unet(recipe, len(data.counts)), new_guide(recipe, data.counts)
    sizes = {"source": parameter_count(source), "target": parameter_count(source), "guide": parameter_count(guide)}
    pretrained_sha256 = _set_in_order(run, data, sizes, tell) if world.first else ""
    world.wait()
    if store.newest_state(run.stage("source")) is None:
        start_from_file(source, recipe, tell)

    def train_stage(stage: Stage) -> int:
        identity = reuse.identity(reuse.made_of(recipe, stage.name, data.kept_sha256, pretrained_sha256))
        return _timed(run, replace(stage, identity=identity), device, report, world, sinks)

    trained = {"source": train_stage(source_stage(recipe, data, source, device))}

    target = build_unet(recipe, len(data.counts))
    target.load_state_dict(source.state_dict())  # theta_tar starts as theta_sou
    trained["target"] = train_stage(target_stage(recipe, data, source, target, device))

    if store.newest_state(run.stage("guide")) is None:
        if recipe.guide.init_from == "target":
            guides.take_encoder(guide, target)
        guides.warm_start(guide, recipe, data, device)
    trained["guide"] = train_stage(guide_stage(recipe, data, guide, device))
    folder = run.stage("guide")
    if world.first and (trained["guide"] or not calibration.is_written(folder)):
        splits = {"train": data.train, "test": data.test}  # the test images are reported on; they choose nothing
        calibration.write(folder, guide, splits, training_schedule(recipe, device), recipe.seed)
    world.wait()
    return trained


def start_from_file(source: UNet, recipe: Recipe, tell: Callable[[str], None]) -> None:
    """Give a source model the weights of source.pretrained, where the recipe names a file.

    Args:
        tell: hears what was settled between the file and the recipe.

    Raises DataError, UsageError where the file is unusable or does not fit.
    """
    if recipe.source.pretrained:
        from engines.networks.pretrained import load_into  # most runs start from nothing

        for note in load_into(source, Path(recipe.source.pretrained), recipe.diffusion):
            tell(note)


def new_unet(recipe: Recipe, classes: int) -> UNet:
    """The recipe's U-Net with its initial weights: a function of the seed, the network and its name, whatever else is built."""
    torch.manual_seed(torch_generator(recipe.seed, "source/weights").initial_seed())
    return build_unet(recipe, classes)


def new_guide(recipe: Recipe, class_counts: Indices) -> Guide:
    """The same for the guide."""
    torch.manual_seed(torch_generator(recipe.seed, "guide/weights").initial_seed())
    return build_guide(recipe, class_counts)


def bytes_to_write(run: RunFolder, status: StageStatus, parameters: int) -> int:
    """Bytes of disk that a stage still takes; what its checkpoints hold already counts as its own."""
    if status.complete:
        return 0
    values = 5 if status.name == "target" and run.recipe.target.patience else 4  # weights, EMA, two moments; the best EMA
    there = status.back or (run.stage(status.name) if not status.aside else None)
    held_bytes = sum(file.stat().st_size for file in there.rglob("*.safetensors")) if there else 0
    return max(0, values * BYTES_PER_VALUE * parameters - held_bytes)


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


def _set_in_order(run: RunFolder, data: LongTail, sizes: Mapping[str, int], tell: Callable[[str], None]) -> str:
    """What one process does before training: class table, space, stale stages aside. Returns sha256 of the file source.pretrained."""
    run.keep_classes(data.table())
    pretrained_sha256 = reuse.pretrained_sha256(run.path, run.recipe)
    if (file := run.recipe.source.pretrained) and not Path(file).exists():
        tell(f"source.pretrained {file} is not there: it is taken to be the file that this run's source started from")
    plan = reuse.examine(run.path, run.recipe, data.kept_sha256, pretrained_sha256)
    for sentence in filter(None, (status.sentence(run.path) for status in plan)):
        tell(sentence)
    store.require_space(run.path, sum(bytes_to_write(run, status, sizes[status.name]) for status in plan))
    reuse.arrange(plan, run.path)
    if not plan[-1].complete:
        calibration.forget(run.stage("guide"))
    return pretrained_sha256


def _timed(run: RunFolder, stage: Stage, device: torch.device, report: Report, world: World, sinks: Sinks | None) -> int:
    started = time.perf_counter()

    def add_cost() -> None:
        if world.first:
            run.add_cost(f"train.{stage.name}", time.perf_counter() - started)

    try:
        steps = train(stage, run.stage(stage.name), run.recipe.seed, device, report, world, sinks)
    except (Interrupted, NumericsError):  # not StorageError: where a checkpoint could not be written, this cannot either, and would hide it
        add_cost()
        raise
    add_cost()
    return steps


def _load_ema(run: RunFolder, stage: str, network: nn.Module) -> None:
    """Raises UsageError where the stage is not trained to its end, or with other settings; DataError where its file does not fit."""
    found, settings = store.load_checkpoint(run.stage(stage)), reuse.settings_of(run.recipe, stage)
    remedy = f"diffrc train --run {run.path}"
    if found is None:
        raise UsageError(f"the {stage} of {run.path} is not trained", remedy)
    if changes := reuse.changes(found.state, found.step, run.recipe, stage, run.classes()["kept_sha256"]):
        raise UsageError(f"the {stage} of {run.path} is stale: {changes}", remedy)
    if not is_complete(found, settings):
        raise UsageError(f"the {stage} of {run.path} stands at step {found.step:,} of {settings.train_steps:,}", remedy)
    network.load_state_dict(found.fitting("best" if found.groups.get("best") else "ema", network.state_dict()))
    network.eval()
