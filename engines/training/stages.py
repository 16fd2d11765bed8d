"""The three stages of a run in their order, and the trained networks read back from it."""

from __future__ import annotations

import hashlib
import re
import time
from typing import Literal

import torch
from torch import nn

from engines import store
from engines.data.longtail import LongTail
from engines.errors import EngineError, UsageError
from engines.networks.guide import Guide
from engines.networks.unet import UNet
from engines.progress import Report, silent
from engines.recipe import Recipe
from engines.store import RunFolder
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
    table = {"names": list(data.names), "counts": data.counts.tolist(), "groups": list(data.groups), "kept_sha256": data.kept_sha256}
    run.keep_classes(table)
    torch.manual_seed(recipe.seed)  # initial weights
    source, guide = build_unet(recipe, len(data.counts)), build_guide(recipe, data.counts)
    values = 2 * sum(p.numel() for p in source.parameters()) + sum(p.numel() for p in guide.parameters())
    store.require_space(run.path, BYTES_PER_VALUE * values)
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
        by_split = {name: guides.accuracy_by_noise(guide, images, schedule, recipe.seed) for name, images in splits.items()}
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


def weights_sha256(network: nn.Module) -> str:
    """sha256 over names, shapes and float32 values of a network's state, in order."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def training_steps(recipe: Recipe) -> dict[str, int]:
    """Steps of each stage."""
    return {"source": recipe.source.train_steps, "target": recipe.target.train_steps, "guide": recipe.guide.train_steps}


def _timed(run: RunFolder, stage: Stage, device: torch.device, report: Report) -> int:
    started = time.perf_counter()
    try:
        return train(stage, run.stage(stage.name), run.recipe.seed, device, report)
    finally:
        run.add_cost(f"train.{stage.name}", time.perf_counter() - started)


def _load_ema(run: RunFolder, stage: str, network: nn.Module) -> None:
    found = store.load_checkpoint(run.stage(stage))
    steps = training_steps(run.recipe)[stage]
    if found is None or found.step < steps:
        state = "is not trained" if found is None else f"stands at step {found.step:,} of {steps:,}"
        raise UsageError(f"the {stage} of {run.path} {state}", f"diffrc train --run {run.path}")
    network.load_state_dict(dict(found.groups["ema"]))
    network.eval()
