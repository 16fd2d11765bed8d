"""The one training loop: batches drawn ahead, steps, metrics, held-out figures, sample grids, checkpoints, exact resume.

What differs between stages is a `Stage`. Every random draw of step n is a function of (seed, stage, n), so a checkpoint holds
no generator state, and a resumed run is bit-equal to an uninterrupted one on a CPU.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engines import store
from engines.data.batches import ALL, Batch, drawn_ahead
from engines.errors import Interrupted, StorageError
from engines.interrupt import StopRequest, catch_signals
from engines.progress import Report, silent
from engines.recipe import StageSection
from engines.store import Checkpoint
from engines.synthesis.sheet import grid_png
from engines.training.distributed import ALONE, World
from engines.training.sinks import Sinks
from engines.training.trainer import Trainer

GRID_COLUMNS = 8  # of sample grids

Forward = Callable[..., Tensor]
"""The model as a loss calls it: itself, or a wrapper that averages gradients over processes."""

Figures = Mapping[str, Tensor]
"""What a loss says beside itself: scalars are logged, as means over the batch's parts; tensors of a row an image go to `after_step`."""


class Draw(Protocol):
    def __call__(self, step: int, rows: slice = ALL) -> Batch: ...


@dataclass(frozen=True)
class Stage:
    """What one stage trains and how.

    Attributes:
        model: the network that is trained.
        draw: the given rows of a step's global batch, on the CPU; a pure function that any thread may call.
        loss: of a part of the batch, on the device: scalar mean over its images, and figures. Called once a micro-batch.
        after_step: sees the figures of the whole global batch, row by row in its order, and the weights after the optimizer. What it
            changes in buffers of `model` or `state` is undone where the step was not finite.
        sample: (N, C, H, W) images in [-1, 1] of the EMA model that it is given, after so many steps.
        sample_every_steps: between two calls of `sample`; 0 = never.
        held_out: figures of the EMA model that it is given; "held_out" is the one that early stopping watches.
        held_out_every_steps: between two calls of `held_out`; it is called after the last step too.
        patience: evaluations without a new best after which the stage ends; its result is then the best EMA weights, here as at the
            last step. 0 = the figure is only logged.
        state: buffers that are saved beside the model.
        identity: what the weights depend on; goes into the state of every checkpoint.
    """

    name: str
    settings: StageSection
    model: nn.Module
    draw: Draw
    loss: Callable[[Forward, Batch], tuple[Tensor, Figures]]
    after_step: Callable[[Mapping[str, Tensor], int], None] | None = None
    sample: Callable[[nn.Module, int], Tensor] | None = None
    sample_every_steps: int = 0
    held_out: Callable[[nn.Module], Mapping[str, float]] | None = None
    held_out_every_steps: int = 1
    patience: int = 0
    state: nn.Module | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)


def train(
    stage: Stage,
    folder: Path,
    seed: int,
    device: torch.device,
    report: Report = silent,
    world: World = ALONE,
    sinks: Sinks | None = None,
) -> int:
    """Train a stage to its end, continuing from its newest good checkpoint; its result ends up in `stage.model`.

    Of several processes the first one writes and reports; all return alike.

    Returns: steps trained by this call, 0 where the stage was complete.

    Raises:
        Interrupted: after a signal; the step it came in is finished and saved, be it the last.
        NumericsError: after `max_nonfinite_steps` skipped steps in a row.
        StorageError: from a checkpoint that cannot be written, or that not every process sees.
    """
    trainer = Trainer(stage, seed, device, world)
    found = store.load_checkpoint(folder)
    first = found.step if found else 0
    if (newest := world.largest(first)) != first:  # asked of all: none writes here before every one has read
        raise StorageError(
            f"a process finds {folder} at step {first:,}, another at step {newest:,}", "put --run on a disk that all processes share"
        )
    if found:
        trainer.load(found)
    if world.first:
        _forget_after(first, folder / "metrics.jsonl")
    done = first
    if not is_complete(found, stage.settings):
        with catch_signals() as stop:
            done = _Loop(stage, trainer, folder, report, stop, sinks or Sinks()).run(first)
    stage.model.load_state_dict(trainer.result)
    stage.model.eval()
    return done - first


def is_complete(found: Checkpoint | None, settings: StageSection) -> bool:
    """Whether a stage with this newest checkpoint is at its end: at its last step, or stopped early."""
    return found is not None and (found.step >= settings.train_steps or found.state.get("stopped_at") is not None)


def result_of(found: Checkpoint) -> Mapping[str, Tensor]:
    """The weights that a stage leaves to those after it: the best EMA where a held-out figure chose it, else the last."""
    return found.groups.get("best", found.groups["ema"])


def measure(stage: Stage, device: torch.device, steps: int = 3) -> float:
    """Seconds that a step takes, its batch drawn in line; the stage is left as it was. One step more is trained first, to warm up."""
    kept = copy.deepcopy((stage.model.state_dict(), stage.state.state_dict() if stage.state else {}))
    trainer = Trainer(stage, 0, device, ALONE)
    began = 0.0
    for step in range(steps + 1):
        if step == 1:
            _synchronize(device)
            began = time.perf_counter()
        trainer.step(step, stage.draw(step))
    _synchronize(device)
    seconds = (time.perf_counter() - began) / steps
    stage.model.load_state_dict(kept[0])
    if stage.state:
        stage.state.load_state_dict(kept[1])
    return seconds


class _Loop:
    """One call of `train`: the steps that it makes, and what is written between them."""

    def __init__(self, stage: Stage, trainer: Trainer, folder: Path, report: Report, stop: StopRequest, sinks: Sinks) -> None:
        self.stage, self.settings, self.trainer, self.folder, self.stop, self.sinks = stage, stage.settings, trainer, folder, stop, sinks
        self.world = trainer.world
        self.report = report if self.world.first else silent
        self.began = self.logged_at = time.perf_counter()
        self.images = 0

    def run(self, first: int) -> int:
        """Train from step `first` on; the steps that are done at the end."""
        settings, world, trainer = self.settings, self.world, self.trainer
        self.first = first
        if not settings.train_steps:  # pre-trained weights as they are: a checkpoint like any other
            self._save(0)
        rows = world.rows(settings.batch_size)

        def draw(step: int) -> Batch:
            batch = self.stage.draw(step, rows)
            if trainer.device.type != "cuda":
                return batch
            with torch.cuda.device(trainer.device):  # a thread begins on the first GPU, and would open a context there
                return batch.pinned()

        with drawn_ahead(draw, first, settings.train_steps, settings.workers) as batches:
            for step, batch in enumerate(batches, first):
                figures = trainer.step(step, batch)
                if self._finish(step, figures):
                    return step + 1
        return settings.train_steps

    def _finish(self, step: int, figures: Figures) -> bool:
        """What follows a step; whether it was the last."""
        settings, done = self.settings, step + 1
        self.images += settings.batch_size
        signal_number = self.world.largest(self.stop.signal_number)
        judged = self.stage.held_out is not None and (done % self.stage.held_out_every_steps == 0 or done == settings.train_steps)
        held_out = self._held_out(done) if judged else {}
        last = done == settings.train_steps or self.trainer.stopped_at is not None
        logged = done % settings.log_every_steps == 0 or judged or last
        saved = done % settings.save_every_steps == 0 or last or signal_number != 0
        if logged or saved or done % settings.max_nonfinite_steps == 0:
            self.trainer.require_finite()
        if logged:
            self._log(done, self.trainer.figures(step, figures), held_out)
        else:
            self.report(self.stage.name, done, settings.train_steps, {})
        every = self.stage.sample_every_steps
        if self.stage.sample and every and done % every == 0 and self.world.first:
            self._sample(self.stage.sample, done)
        if saved:
            self._save(done)
        if signal_number:
            raise _interrupted(signal_number, f"{self.stage.name} is saved at step {done:,} of {settings.train_steps:,}")
        return last

    def _held_out(self, done: int) -> Mapping[str, float]:
        """Figures of the EMA model on held-out images, taken by the first process and judged by all."""
        figures: Mapping[str, float] = {}
        assert self.stage.held_out
        if self.world.first:
            with self._aside(), self.trainer.ema_weights() as model:
                figures = self.stage.held_out(model)
        value, known = self.world.told([figures.get("held_out", math.inf), float("held_out" in figures)])
        if self.stage.patience and known:
            self.trainer.judge(value, done)
        return figures

    def _log(self, done: int, figures: Mapping[str, float], held_out: Mapping[str, float]) -> None:
        now, total = time.perf_counter(), self.settings.train_steps
        line = {**figures, **held_out, "images_per_second": self.images / (now - self.logged_at)}
        if self.world.first:
            path = self.folder / "metrics.jsonl"
            store.append_json(path, {"step": done, **{k: v if math.isfinite(v) else None for k, v in line.items()}})
            self.sinks.write(self.stage.name, done, line)
        end = total if self.trainer.stopped_at is None else done
        seconds_left = (now - self.began) / (done - self.first) * (end - done)
        self.report(self.stage.name, done, end, {**line, "seconds_left": seconds_left})
        self.logged_at, self.images = now, 0

    def _sample(self, sample: Callable[[nn.Module, int], Tensor], done: int) -> None:
        with self._aside(), self.trainer.ema_weights() as model:
            picture = grid_png(sample(model, done), GRID_COLUMNS)
        store.write_bytes(self.folder / "samples" / f"{done:09d}.png", picture)
        self.sinks.image(self.stage.name, done, picture)

    def _save(self, done: int) -> None:
        with self._aside():
            if self.world.first:
                store.save_checkpoint(self.folder, self.trainer.checkpoint(done))
            self.world.wait()  # a process that ends before the save is done would have the others ended too

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Block whose time is no training: images a second are those of the steps."""
        _synchronize(self.trainer.device)
        began = time.perf_counter()
        yield
        self.logged_at += time.perf_counter() - began


def _forget_after(step: int, metrics: Path) -> None:
    """Drop the metrics of steps that will be trained again."""
    lines = store.read_json_lines(metrics)
    if any(line["step"] > step for line in lines):
        store.write_json_lines(metrics, [line for line in lines if line["step"] <= step])


def _interrupted(signal_number: int, what: str) -> Interrupted:
    stop = StopRequest()
    stop.signal_number = signal_number  # which may have come to another process alone
    return stop.error(what)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
