"""The one training loop: AdamW, warm-up, clipping, EMA, autocast, metrics, sample grids, checkpoints, exact resume.

What differs between stages is a `Stage`. Every random draw of step n is a function of (seed, stage, n), so a checkpoint holds
no generator state and a resumed run is bit-equal to an uninterrupted one on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines import store
from engines.data.batches import torch_generator
from engines.errors import NumericsError
from engines.interrupt import StopRequest, catch_signals
from engines.progress import Report, silent
from engines.recipe import StageSection
from engines.store import Checkpoint
from engines.synthesis.sheet import grid_png

GRID_COLUMNS = 8  # of sample grids

Figures = Mapping[str, Tensor | float]


@dataclass(frozen=True)
class Stage:
    """What one stage trains and how.

    `loss(step)` draws the step's batch and returns a scalar and the figures to log. `after_step` sees the weights after the
    optimizer. `sample` makes (N, C, H, W) images in [-1, 1] with the EMA model that it is given.
    """

    name: str
    settings: StageSection
    model: nn.Module
    loss: Callable[[int], tuple[Tensor, Figures]]
    after_step: Callable[[], None] | None = None
    sample: Callable[[nn.Module, int], Tensor] | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)  # what the weights depend on: goes into the state of every checkpoint


def train(stage: Stage, folder: Path, seed: int, device: torch.device, report: Report = silent) -> int:
    """Train a stage to its last step, continuing from its newest good checkpoint; the EMA weights end up in `stage.model`.

    Returns: steps trained by this call, 0 where the stage was complete.

    Raises:
        Interrupted: after a signal; the step it came in is finished and saved, be it the last.
        NumericsError: after `max_nonfinite_steps` skipped steps in a row.
        StorageError: from a checkpoint that cannot be written.
    """
    settings = stage.settings
    trainer = _Trainer(stage, device)
    first = trainer.resume(folder)
    if first < settings.train_steps:
        with catch_signals() as stop:
            _loop(stage, trainer, folder, first, seed, report, stop)
    stage.model.load_state_dict(trainer.ema)
    stage.model.eval()
    return settings.train_steps - first


def _loop(stage: Stage, trainer: _Trainer, folder: Path, first: int, seed: int, report: Report, stop: StopRequest) -> None:
    settings, metrics = stage.settings, folder / "metrics.jsonl"
    logged_at, images = time.perf_counter(), 0
    for step in range(first, settings.train_steps):
        figures = trainer.step(step, torch_generator(seed, f"{stage.name}/dropout", step).initial_seed())
        done = step + 1
        images += settings.batch_size
        if done % settings.log_every_steps == 0 or done == settings.train_steps:
            now = time.perf_counter()
            line = {name: float(value) for name, value in figures.items()} | {"images_per_second": images / (now - logged_at)}
            store.append_json(metrics, {"step": done, **{k: v if math.isfinite(v) else None for k, v in line.items()}})
            report(stage.name, done, settings.train_steps, line)
            logged_at, images = now, 0
        else:
            report(stage.name, done, settings.train_steps, {})
        if stage.sample and settings.sample_every_steps and done % settings.sample_every_steps == 0:
            with trainer.ema_weights():
                store.write_bytes(folder / "samples" / f"{done:09d}.png", grid_png(stage.sample(stage.model, done), GRID_COLUMNS))
        if done % settings.save_every_steps == 0 or done == settings.train_steps or stop.requested:
            store.save_checkpoint(folder, trainer.checkpoint(done))
        if stop.requested:
            raise stop.error(f"{stage.name} is saved at step {done:,} of {settings.train_steps:,}")


class _Trainer:
    """Weights, EMA and optimizer of a stage, and one step of it."""

    def __init__(self, stage: Stage, device: torch.device) -> None:
        self.stage, self.device = stage, device
        self.model = stage.model.to(device)
        settings = stage.settings
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        self.ema = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.skipped, self.skipped_in_a_row, self.damaged_checkpoints = 0, 0, 0

    def step(self, step: int, seed: int) -> Figures:
        """One optimizer step on the batch of `step`; a loss or gradient that is not finite skips it and leaves the EMA alone."""
        settings = self.stage.settings
        torch.manual_seed(seed)  # dropout is the one draw that has no generator argument
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            loss, figures = self.stage.loss(step)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.parameters, settings.grad_clip)
        if bool(torch.isfinite(loss.detach() + norm)):
            self.optimizer.step()
            if self.stage.after_step:
                self.stage.after_step()
            self._update_ema(step)
            self.skipped_in_a_row = 0
        else:
            self._skip(step)
        self.optimizer.zero_grad(set_to_none=True)
        lr = self.optimizer.param_groups[0]["lr"]
        damaged = {"damaged_checkpoints": float(self.damaged_checkpoints)} if self.damaged_checkpoints else {}
        log = {"grad_norm": norm.detach(), "lr": lr, "skipped_steps": float(self.skipped), **damaged}
        return {"loss": loss.detach(), **figures, **log}

    def _update_ema(self, step: int) -> None:
        decay = min(self.stage.settings.ema_decay, (1 + step) / (10 + step))  # a short run forgets its random start
        for name, parameter in self.model.named_parameters():
            self.ema[name].lerp_(parameter.detach(), 1 - decay)
        for name, buffer in self.model.named_buffers():  # prototypes are a moving average already, and of unit length
            self.ema[name].copy_(buffer)

    def _skip(self, step: int) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.stage.settings.max_nonfinite_steps:
            raise NumericsError(
                f"{self.stage.name}: {self.skipped_in_a_row} steps in a row were not finite, up to step {step + 1:,}",
                f"the last checkpoint is good: try --set {self.stage.name}.precision=fp32 or a smaller {self.stage.name}.lr in a new run",
            )

    def ema_weights(self) -> _Swapped:
        """Context in which the model holds the EMA weights and is in evaluation mode."""
        return _Swapped(self.model, self.ema)

    def checkpoint(self, step: int) -> Checkpoint:
        optimizer = {f"{i}.{k}": v for i, entry in self.optimizer.state_dict()["state"].items() for k, v in entry.items()}
        groups = {"model": self.model.state_dict(), "ema": self.ema, "optimizer": optimizer}
        counts = {
            "skipped_steps": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "damaged_checkpoints": self.damaged_checkpoints,
        }
        return Checkpoint(step, groups, {"stage": self.stage.name, **counts, **self.stage.identity})

    def resume(self, folder: Path) -> int:
        """Load the newest good checkpoint, drop metrics from after it, and return the step to go on with."""
        found = store.load_checkpoint(folder)
        if found is not None:
            self._load(found)
        first = found.step if found else 0
        lines = store.read_json_lines(folder / "metrics.jsonl")
        if any(line["step"] > first for line in lines):
            store.write_json_lines(folder / "metrics.jsonl", [line for line in lines if line["step"] <= first])
        return first

    def _load(self, found: Checkpoint) -> None:
        self.model.load_state_dict(dict(found.groups["model"]))
        self.ema = {name: value.to(self.device) for name, value in found.groups["ema"].items()}
        state = self.optimizer.state_dict()
        for key, value in found.groups.get("optimizer", {}).items():
            index, name = key.split(".", 1)
            state["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(state)
        self.skipped, self.skipped_in_a_row = int(found.state["skipped_steps"]), int(found.state["skipped_in_a_row"])
        self.damaged_checkpoints = int(found.state["damaged_checkpoints"]) + len(found.skipped)


class _Swapped:
    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self.model, self.weights = model, weights

    def __enter__(self) -> None:
        self.before = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(dict(self.weights))
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.model.load_state_dict(self.before)
        self.model.train()


def learning_rate(settings: StageSection, step: int) -> float:
    """Linear warm-up to lr, then constant or half a cosine that reaches 0 after the last step."""
    warmup = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    if settings.lr_decay == "none" or step < settings.warmup_steps:
        return settings.lr * warmup
    share = (step - settings.warmup_steps) / max(settings.train_steps - settings.warmup_steps, 1)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * share))
