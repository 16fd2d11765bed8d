"""What a study would take, from a few steps of its first arm and the operations of all of them; nothing is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engines import recipe as recipes
from engines.data.longtail import LongTail
from engines.evaluation import forecast as evaluation
from engines.networks.unet import parameter_count
from engines.progress import peak_memory_bytes
from engines.study import lanes
from engines.study.grid import methods_of
from engines.study.plan import Arm, Study
from engines.study.run import CELLS, missing
from engines.synthesis.plan import fill_counts
from engines.synthesis.synthesize import BYTES_PER_IMAGE
from engines.training.cost import cost_of
from engines.training.loop import measure
from engines.training.source import source_stage
from engines.training.stages import BYTES_PER_VALUE, new_unet

VALUES = 4  # of a weight in a checkpoint: itself, its average, two moments


@dataclass(frozen=True)
class StudyForecast:
    """What is left of a study, as if this machine did one thing after another with all its processors."""

    operations: float  # of networks and images; what lies there half-made counts as not begun
    images_seconds: float
    recognizers: int  # at most: those whose images are not made yet have no result to find
    recognizers_seconds: float
    disk_bytes: int
    memory_bytes: int
    device: str

    @property
    def seconds_left(self) -> float:
        return self.images_seconds + self.recognizers_seconds


def forecast(study: Study, arms: Sequence[Arm], data: Mapping[str, LongTail], out: Path, device: torch.device) -> StudyForecast:
    """What `run_study` would take; `data` is by arm, of `prepare_arms`."""
    todo = missing(arms, data, range(study.seeds), out)
    read = {recipes.digest(arm.recipe.data): data[arm.name] for arm in arms}
    operations = disk_bytes = 0.0
    for arm_recipes in todo.values():
        tail = read[recipes.digest(arm_recipes[0].data)]
        operations += lanes.operations(arm_recipes, tail)
        disk_bytes += _bytes(arm_recipes, tail)
    pace = seconds_per_operation(arms, data, device) if todo else 0.0
    kept = len(list((out / CELLS).glob("*.json")))
    left, seconds, memory_bytes = max(0, study.seeds * sum(len(methods_of(study, arm)) for arm in arms) - kept), 0.0, peak_memory_bytes()
    if left:
        found = evaluation.forecast_unmade(arms[0].recipe, data[arms[0].name])
        seconds = found.seconds_left * left / found.recognizers
        memory_bytes = max(memory_bytes, found.memory_bytes)
    return StudyForecast(operations, operations * pace, left, seconds, round(disk_bytes), memory_bytes, device.type)


def seconds_per_operation(arms: Sequence[Arm], data: Mapping[str, LongTail], device: torch.device) -> float:
    """Of a training step of the source model of the first arm that makes images."""
    arm = next(arm for arm in arms if arm.images == "synthetic")
    source = arm.recipe.source.model_copy(update={"train_steps": max(1, arm.recipe.source.train_steps)})
    recipe, tail = arm.recipe.model_copy(update={"source": source}), data[arm.name]
    stage = source_stage(recipe, tail, new_unet(recipe, len(tail.counts)), device)
    return measure(stage, device) * source.train_steps / cost_of(recipe).source


def _bytes(arms: Sequence[recipes.Recipe], data: LongTail) -> float:
    """Of the networks and images of a lane, those that arms share once."""
    parts = {part: what for recipe in arms for what, (part, _) in lanes.parts_of(recipe, data).items()}
    network = VALUES * BYTES_PER_VALUE * parameter_count(new_unet(arms[0], len(data.counts)))
    images = {lanes.images_digest(recipe): fill_counts(recipe, data.counts, data.groups).sum() for recipe in arms}
    return network * sum(what != "synth" for what in parts.values()) + float(sum(images.values())) * BYTES_PER_IMAGE
