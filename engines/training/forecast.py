"""What training a run would take, measured over a few real steps of each stage; nothing is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from engines import store
from engines.data.longtail import LongTail
from engines.networks.unet import parameter_count
from engines.progress import Report, peak_memory_bytes, silent
from engines.recipe import Recipe
from engines.store import RunFolder
from engines.training import reuse
from engines.training.guide import guide_stage
from engines.training.loop import Stage, measure
from engines.training.reuse import StageStatus
from engines.training.source import source_stage
from engines.training.stages import bytes_to_write, new_guide, new_unet, start_from_file
from engines.training.target import target_stage


@dataclass(frozen=True)
class StageForecast:
    """What is left to do for a stage.

    Attributes:
        steps_left: 0 where it is complete.
        images_per_second: as measured, its batches drawn in line; None where no step is left.
        disk_bytes: that it still writes, a folder kept aside not counted.
        memory_bytes: at most, while the steps were measured: of the GPU, or of the process; None where no step is left.
    """

    status: StageStatus
    parameters: int
    steps_left: int
    images_per_second: float | None
    seconds_left: float
    disk_bytes: int
    memory_bytes: int | None


@dataclass(frozen=True)
class Forecast:
    """The stages of a run, and the bytes that are free where it lies or will lie."""

    stages: tuple[StageForecast, ...]
    free_bytes: int

    @property
    def seconds_left(self) -> float:
        return sum(stage.seconds_left for stage in self.stages)

    @property
    def disk_bytes(self) -> int:
        return sum(stage.disk_bytes for stage in self.stages)


def forecast(path: Path, recipe: Recipe, data: LongTail, device: torch.device, report: Report = silent) -> Forecast:
    """What `train_run` would do in a folder, which need not exist.

    Rates are those of untrained networks: values do not change them. Held-out figures, sample grids and checkpoints are not
    counted, nor that a thread draws the batches meanwhile.

    Raises ConflictError, DataError and UsageError as `train_run`.
    """
    run = RunFolder(path, recipe)
    data.train.preload(report)
    if (path / "classes.json").exists():
        run.keep_classes(data.table())  # writes nothing where there is a table
    plan = reuse.examine(path, recipe, data.kept_sha256, reuse.pretrained_sha256(path, recipe))
    classes = len(data.counts)
    source, target, guide = new_unet(recipe, classes), new_unet(recipe, classes), new_guide(recipe, data.counts)
    if plan[0].step is None:
        start_from_file(source, recipe, lambda _: None)  # refused now rather than later
    made = {
        "source": lambda: source_stage(recipe, data, source, device),
        "target": lambda: target_stage(recipe, data, source, target, device),
        "guide": lambda: guide_stage(recipe, data, guide, device),
    }
    sizes = {"source": parameter_count(source), "target": parameter_count(target), "guide": parameter_count(guide)}
    found = []
    for done, status in enumerate(plan):
        report("measure", done, len(plan), {})
        left = 0 if status.complete else status.steps - (status.step or 0)
        seconds, memory = _measured(made[status.name](), device) if left else (0.0, None)
        batch_size = reuse.settings_of(recipe, status.name).batch_size
        found.append(
            StageForecast(
                status,
                sizes[status.name],
                left,
                batch_size / seconds if left else None,
                left * seconds,
                bytes_to_write(run, status, sizes[status.name]),
                memory,
            )
        )
    report("measure", len(plan), len(plan), {})
    return Forecast(tuple(found), store.free_bytes(path))


def _measured(stage: Stage, device: torch.device) -> tuple[float, int | None]:
    """Seconds a step, and the most bytes that torch held on a GPU, or the process."""
    if device.type != "cuda":
        return measure(stage, device), peak_memory_bytes()
    torch.cuda.reset_peak_memory_stats(device)
    return measure(stage, device), torch.cuda.max_memory_allocated(device)
