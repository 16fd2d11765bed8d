"""Weights, EMA and optimizer of a stage, one step of it, and its state as a checkpoint.

A step reads nothing back from the device: whether its numbers are finite is decided there, by a tensor that the optimizer, the
EMA and the counters take as an argument. What went wrong is read when a step is logged or saved.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from engines.data.batches import Batch, torch_generator
from engines.errors import NumericsError
from engines.recipe import StageSection
from engines.store import Checkpoint
from engines.training.distributed import World

if TYPE_CHECKING:
    from engines.training.loop import Stage


class Trainer:
    """A stage on a device, in one of the processes that train it."""

    def __init__(self, stage: Stage, seed: int, device: torch.device, world: World) -> None:
        self.stage, self.seed, self.device, self.world = stage, seed, device, world
        settings = stage.settings
        self.model = stage.model.to(device)
        self.forward = world.wrap(self.model)
        self.state = stage.state.to(device) if stage.state else nn.Module()
        self.buffers = [*self.model.buffers(), *self.state.buffers()]
        world.share(self.buffers)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = GuardedAdamW(self.parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
        self.ema = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.skips = Skips(device)
        self.best: dict[str, Tensor] = {}  # EMA weights of the lowest held-out figure
        self.best_value, self.best_step, self.misses = math.inf, 0, 0
        self.stopped_at: int | None = None
        self.damaged_checkpoints = 0

    @property
    def result(self) -> Mapping[str, Tensor]:
        """What the stage has made so far: the EMA weights, the best ones where a held-out figure chooses."""
        return self.best or self.ema

    def step(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """One optimizer step on this process's rows of a batch, in micro-batches; a loss or gradient that is not finite changes nothing.

        Returns: figures, scalars on the device; of the whole global batch once `figures` has read them.
        """
        settings = self.stage.settings
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        before = [buffer.clone() for buffer in self.buffers]
        loss, figures = self._gradients(step, batch)
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        finite = torch.isfinite(self.world.mean(loss) + norm)
        self.optimizer.grad_scale = (norm / settings.grad_clip).clamp(min=1.0)
        self.optimizer.found_inf = (~finite).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            if self.stage.after_step:
                rows = {name: self.world.gathered(value) for name, value in figures.items() if value.ndim}
                self.stage.after_step(rows, step)
            for buffer, old in zip(self.buffers, before, strict=True):
                buffer.copy_(torch.where(finite, buffer, old))
            self._update_ema(step, finite)
            self.skips.count(step, finite, settings.max_nonfinite_steps)
        return {"loss": loss, **{name: value for name, value in figures.items() if not value.ndim}, "grad_norm": norm.detach()}

    def _gradients(self, step: int, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of the mean loss into the parameters; that loss, and the figures of all micro-batches in one."""
        settings, n = self.stage.settings, self.stage.settings.accumulate
        losses: list[Tensor] = []
        parts: list[Mapping[str, Tensor]] = []
        self.forward.train()
        for i in range(n):
            # Dropout is the one draw without a generator argument. Counted through ranks and micro-batches, two processes draw
            # the masks of two micro-batches of one.
            torch.manual_seed(torch_generator(self.seed, f"{self.stage.name}/dropout", step, self.world.rank * n + i).initial_seed())
            with self.world.unsynchronized(self.forward) if i < n - 1 else contextlib.nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                    loss, figures = self.stage.loss(self.forward, batch.part(i, n).to(self.device))
                (loss / n).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            parts.append(figures)
        joined = {name: torch.cat if value.ndim else _mean for name, value in parts[0].items()}
        return _mean(losses), {name: join([part[name].detach() for part in parts]) for name, join in joined.items()}

    def _update_ema(self, step: int, finite: Tensor) -> None:
        decay = min(self.stage.settings.ema_decay, (1 + step) / (10 + step))  # a short run forgets its random start
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        averages = [self.ema[name] for name in names]
        weight = (1 - decay) * finite
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], [weight] * len(averages))
        for name, buffer in self.model.named_buffers():  # prototypes are a moving average already, and of unit length
            self.ema[name].copy_(buffer)

    def figures(self, step: int, figures: Mapping[str, Tensor]) -> dict[str, float]:
        """The figures of a step over all processes, read from the device, with the learning rate and what was skipped so far."""
        names = list(figures)
        values = self.world.mean(torch.stack([figures[name].float() for name in names])).tolist() if names else []
        damaged = {"damaged_checkpoints": float(self.damaged_checkpoints)} if self.damaged_checkpoints else {}
        log = {"lr": learning_rate(self.stage.settings, step), "skipped_steps": float(self.skips.total)}
        return dict(zip(names, values, strict=True)) | log | damaged

    def require_finite(self) -> None:
        """Raise NumericsError where `max_nonfinite_steps` steps in a row were skipped since the last call."""
        at = int(self.skips.failed_at)
        if at >= 0:
            name, count = self.stage.name, self.stage.settings.max_nonfinite_steps
            raise NumericsError(
                f"{name}: {count} steps in a row were not finite, up to step {at + 1:,}",
                f"the last checkpoint is good: try --set {name}.precision=fp32 or a smaller {name}.lr in a new run",
            )

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[nn.Module]:
        """Context in which the model holds the EMA weights and is in evaluation mode."""
        before = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema)
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.load_state_dict(before)
            self.model.train()

    def judge(self, value: float, done: int) -> None:
        """Take note of a held-out figure after `done` steps: a new best is kept, too many others in a row end the stage."""
        if value < self.best_value:
            self.best = {name: tensor.clone() for name, tensor in self.ema.items()}
            self.best_value, self.best_step, self.misses = value, done, 0
            return
        self.misses += 1
        if self.misses >= self.stage.patience:
            self.stopped_at = done

    def checkpoint(self, done: int) -> Checkpoint:
        """Everything that the steps after `done` depend on."""
        optimizer = {f"{i}.{k}": v for i, entry in self.optimizer.state_dict()["state"].items() for k, v in entry.items()}
        groups = {"model": self.model.state_dict(), "ema": self.ema, "optimizer": optimizer}
        groups |= {name: group for name, group in (("state", self.state.state_dict()), ("best", self.best)) if group}
        state = {
            "stage": self.stage.name,
            "skipped_steps": int(self.skips.total),
            "skipped_in_a_row": int(self.skips.in_a_row),
            "damaged_checkpoints": self.damaged_checkpoints,
        }
        if self.best:
            state |= {"best_held_out": self.best_value, "best_step": self.best_step}
        if self.stage.patience:
            state["evaluations_since_best"] = self.misses
        if self.stopped_at is not None:
            state["stopped_at"] = self.stopped_at
        return Checkpoint(done, groups, state | dict(self.stage.identity))

    def load(self, found: Checkpoint) -> None:
        """Go on from a checkpoint of this stage. Raises DataError where its tensors are not those of this stage's networks."""
        network = self.model.state_dict()
        self.model.load_state_dict(found.fitting("model", network))
        self.state.load_state_dict(found.fitting("state", self.state.state_dict()))
        self.ema = {name: value.to(self.device) for name, value in found.fitting("ema", network).items()}
        best = found.fitting("best", network) if found.groups.get("best") else {}
        self.best = {name: value.to(self.device) for name, value in best.items()}
        optimizer = self.optimizer.state_dict()
        moments = found.fitting("optimizer", self._moments()) if found.groups.get("optimizer") else {}  # none before the first step
        for key, value in moments.items():
            index, name = key.split(".", 1)
            optimizer["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(optimizer)
        state = found.state
        self.skips.total.fill_(int(state["skipped_steps"]))
        self.skips.in_a_row.fill_(int(state["skipped_in_a_row"]))
        self.damaged_checkpoints = int(state["damaged_checkpoints"]) + len(found.skipped)
        if self.best:
            self.best_value, self.best_step = float(state["best_held_out"]), int(state["best_step"])
        self.misses = int(state.get("evaluations_since_best", 0))
        self.stopped_at = state.get("stopped_at")

    def _moments(self) -> dict[str, Tensor]:
        """What AdamW keeps of each parameter, by the names that a checkpoint gives it."""
        forms = [(f"{i}.{key}", p) for i, p in enumerate(self.parameters) for key in ("exp_avg", "exp_avg_sq")]
        return dict(forms) | {f"{i}.step": torch.zeros(()) for i in range(len(self.parameters))}


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that divides the gradients by `grad_scale`, and changes nothing, not its step count either, where `found_inf` is 1.

    Both are tensors on the device. They are how torch.amp.GradScaler talks to the fused optimizers.
    """

    grad_scale: Tensor
    found_inf: Tensor


class Skips:
    """Steps that were not finite, counted on the device."""

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros((), dtype=torch.int64, device=device)
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.failed_at = torch.full((), -1, dtype=torch.int64, device=device)  # the step that was the last of too many in a row

    def count(self, step: int, finite: Tensor, limit: int) -> None:
        """Count a step; `limit` of them in a row are too many."""
        skipped = (~finite).long()
        self.total += skipped
        self.in_a_row = (self.in_a_row + 1) * skipped
        failed = (self.in_a_row >= limit) & (self.failed_at < 0)
        self.failed_at = torch.where(failed, step, self.failed_at)


def learning_rate(settings: StageSection, step: int) -> float:
    """Linear warm-up to lr, then constant or half a cosine that reaches 0 after the last step."""
    warmup = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    if settings.lr_decay == "none" or step < settings.warmup_steps:
        return settings.lr * warmup
    share = (step - settings.warmup_steps) / max(settings.train_steps - settings.warmup_steps, 1)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * share))


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(0)
