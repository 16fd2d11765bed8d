"""The training loop: exact resume after any end, EMA, learning rate, steps that are not finite, signals."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from engines import store
from engines.data.batches import ALL, Batch, torch_generator
from engines.errors import Interrupted, NumericsError
from engines.interrupt import catch_signals
from engines.recipe import StageSection
from engines.training.loop import Forward, Stage, train
from engines.training.trainer import learning_rate

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
STEPS = 7
Hook = Callable[[int, Tensor], Tensor]


def settings(**changes: Any) -> StageSection:
    values: dict[str, Any] = {
        "train_steps": STEPS,
        "batch_size": 4,
        "lr": 0.05,
        "warmup_steps": 3,
        "lr_decay": "cosine",
        "ema_decay": 0.6,
        "weight_decay": 0.1,
        "precision": "fp32",
        "log_every_steps": 1,
        "sample_every_steps": 0,
        "save_every_steps": 3,
        "max_nonfinite_steps": 3,
    }
    return StageSection(**(values | changes))


def toy(hook: Hook = lambda _, loss: loss, **changes: Any) -> Stage:
    """A small regression with dropout and a buffer; `hook(step, loss)` may spoil a step's loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1))
    model.register_buffer("steps_seen", torch.zeros(1))

    section = settings(**changes)

    def draw(step: int, rows: slice = ALL) -> Batch:
        noise = torch.randn(section.batch_size, 3, generator=torch_generator(0, "toy", step))[rows]
        count = len(noise)
        pixels, none = torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.zeros(count, dtype=torch.bool)
        return Batch(pixels, torch.full((count,), step), torch.zeros(count), noise, none, section.batch_size // count)

    def loss(forward: Forward, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch.noise
        value = (forward(x) - x.sum(1, keepdim=True)).square().mean()
        return hook(int(batch.y[0]), value), {"mean": x.mean()}

    def after_step(_rows: Mapping[str, Tensor], _step: int) -> None:
        model.steps_seen.add_(1)

    return Stage("toy", section, model, draw, loss, after_step)


def end_of(folder: Path) -> tuple[dict[str, dict[str, Tensor]], list[dict[str, Any]]]:
    """The last checkpoint's tensors, and the metrics without the one figure that is a time."""
    found = store.load_checkpoint(folder)
    assert found is not None
    lines = [{k: v for k, v in line.items() if k != "images_per_second"} for line in store.read_json_lines(folder / "metrics.jsonl")]
    return {name: dict(group) for name, group in found.groups.items()}, lines


def assert_same_end(a: Path, b: Path) -> None:
    (tensors_a, lines_a), (tensors_b, lines_b) = end_of(a), end_of(b)
    assert lines_a == lines_b
    assert {name: set(group) for name, group in tensors_a.items()} == {name: set(group) for name, group in tensors_b.items()}
    for name, group in tensors_a.items():
        assert all(torch.equal(value, tensors_b[name][key]) for key, value in group.items()), name


class Killed(BaseException):
    pass


def killed(step: int) -> Hook:
    def hook(now: int, loss: Tensor) -> Tensor:
        if now == step:
            raise Killed
        return loss

    return hook


@pytest.mark.parametrize("step", range(STEPS))
def test_a_run_killed_in_any_step_ends_bit_equal_to_one_that_was_not(step: int, tmp_path: Path) -> None:
    assert train(toy(), tmp_path / "whole", 0, CPU) == STEPS
    with pytest.raises(Killed):
        train(toy(killed(step)), tmp_path / "killed", 0, CPU)
    assert train(toy(), tmp_path / "killed", 0, CPU) == STEPS - step // 3 * 3
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def test_weights_ema_optimizer_and_metrics_are_what_is_compared(tmp_path: Path) -> None:
    train(toy(), tmp_path, 0, CPU)
    tensors, lines = end_of(tmp_path)
    assert set(tensors) == {"model", "ema", "optimizer"}
    assert {key.split(".")[1] for key in tensors["optimizer"]} == {"step", "exp_avg", "exp_avg_sq"}
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert set(lines[0]) == {"step", "loss", "mean", "grad_norm", "lr", "skipped_steps"}


def test_a_complete_stage_trains_no_step_and_comes_back_with_the_ema_weights(tmp_path: Path) -> None:
    first, second = toy(), toy(killed(0))
    train(first, tmp_path, 0, CPU)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert train(second, tmp_path, 0, CPU) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    ema = end_of(tmp_path)[0]["ema"]
    for stage in (first, second):
        assert all(torch.equal(value, ema[name]) for name, value in stage.model.state_dict().items())
        assert not stage.model.training


def test_the_same_seed_gives_the_same_weights_and_another_seed_other_dropout(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(toy(), tmp_path / name, seed, CPU)
    assert_same_end(tmp_path / "a", tmp_path / "b")
    assert not torch.equal(end_of(tmp_path / "a")[0]["ema"]["0.weight"], end_of(tmp_path / "c")[0]["ema"]["0.weight"])


def test_a_kill_9_at_any_of_its_writes_leaves_a_run_that_ends_bit_equal(tmp_path: Path) -> None:
    # One process imports torch and forks a child for every few writes; the child kills itself there, its successor finishes.
    script = """
import os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_loop import CPU, toy, train

root, calls, kill_at = Path(sys.argv[1]), 0, 0

def counted(real):
    def wrapper(*a, **k):
        global calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*a, **k)
    return wrapper

os.fsync, Path.replace, shutil.rmtree = map(counted, (lambda _: None, Path.replace, shutil.rmtree))
train(toy(), root / "whole", 0, CPU)
last = calls
for point in range(1, last + 1, last // 8):
    for calls, kill_at, status in ((0, point, signal.SIGKILL), (0, 0, 0)):
        pid = os.fork()
        if pid == 0:
            train(toy(), root / str(point), 0, CPU)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == status
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    folders = list(tmp_path.iterdir())
    assert len(folders) > 8
    for folder in folders:
        assert_same_end(tmp_path / "whole", folder)
        assert list(folder.glob("*.tmp")) == []


@pytest.mark.parametrize("step", [1, STEPS - 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_finishes_the_step_and_saves_it_be_it_the_last(step: int, number: signal.Signals, tmp_path: Path) -> None:
    def interrupt(now: int, loss: Tensor) -> Tensor:
        if now == step:
            os.kill(os.getpid(), number)
        return loss

    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"stopped by {number.name}: toy is saved at step {step + 1} of 7") as stop:
        train(toy(interrupt), tmp_path / "stopped", 0, CPU)
    assert stop.value.signal_number == number
    assert signal.getsignal(number) is handler
    assert train(toy(), tmp_path / "stopped", 0, CPU) == STEPS - step - 1
    train(toy(), tmp_path / "whole", 0, CPU)
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")


def test_a_second_signal_ends_the_job_at_once() -> None:
    with catch_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def spoiled(value: float, *steps: int) -> Hook:
    return lambda step, loss: loss * value if step in steps else loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_and_counted_and_changes_nothing(value: float, tmp_path: Path) -> None:
    every = {"save_every_steps": 1, "max_nonfinite_steps": 3}
    states: dict[int, dict[str, dict[str, Tensor]]] = {}

    def report(_what: str, done: int, _total: int, _figures: Any) -> None:  # called before the checkpoint of `done` is written
        if done > 1:
            states[done - 1] = end_of(tmp_path)[0]

    train(toy(spoiled(value, 2, 3), **every), tmp_path, 0, CPU, report)
    for group in ("model", "ema", "optimizer"):
        for key, tensor in states[2][group].items():
            assert torch.equal(tensor, states[4][group][key]), (group, key)
    assert not torch.equal(states[4]["model"]["0.weight"], states[5]["model"]["0.weight"])
    lines = end_of(tmp_path)[1]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2, 2, 2, 2]
    assert [line["loss"] is None for line in lines] == [False, False, True, True, False, False, False]
    assert float(end_of(tmp_path)[0]["model"]["steps_seen"]) == STEPS - 2  # `after_step` saw none of them


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is(tmp_path: Path) -> None:
    def steep(step: int, loss: Tensor) -> Tensor:
        return loss + (loss.clone().detach().requires_grad_() * 0 + (loss - loss.detach())).sqrt().nan_to_num() if step == 2 else loss

    train(toy(steep), tmp_path, 0, CPU)
    assert [line["skipped_steps"] for line in end_of(tmp_path)[1]] == [0, 0, 1, 1, 1, 1, 1]
    assert end_of(tmp_path)[1][2]["loss"] is not None


def test_too_many_in_a_row_stop_training_and_resuming_stops_where_it_would_have(tmp_path: Path) -> None:
    bad = spoiled(math.nan, 1, 3, 4, 5)
    for save_every in (100, 1):
        folder = tmp_path / str(save_every)
        for attempt in range(2):
            with pytest.raises(NumericsError, match="toy: 3 steps in a row were not finite, up to step 6") as failure:
                train(toy(bad, save_every_steps=save_every), folder, 0, CPU)
            assert failure.value.exit_code == 7, attempt
    found = store.load_checkpoint(tmp_path / "1")
    assert found is not None
    assert found.step == 5
    assert torch.isfinite(found.groups["model"]["0.weight"]).all()


def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_the_end_is_the_same_and_says_so(tmp_path: Path) -> None:
    for name in ("whole", "damaged"):
        train(toy(), tmp_path / name, 0, CPU)
    weights = tmp_path / "damaged" / "step-000000007" / "ema.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 4
    weights.write_bytes(data)
    assert train(toy(), tmp_path / "damaged", 0, CPU) == 1
    (whole, _), (mended, lines) = end_of(tmp_path / "whole"), end_of(tmp_path / "damaged")
    assert all(torch.equal(value, mended[group][key]) for group, tensors in whole.items() for key, value in tensors.items())
    assert [line.get("damaged_checkpoints", 0) for line in lines] == [0, 0, 0, 0, 0, 0, 1]


def test_the_ema_is_the_running_average_that_forgets_its_start_and_buffers_are_copied(tmp_path: Path) -> None:
    weights: list[Tensor] = []
    stage = toy()
    remember = stage.after_step

    def after_step(rows: Mapping[str, Tensor], step: int) -> None:
        assert remember
        remember(rows, step)
        weights.append(stage.model.state_dict()["0.weight"].clone())

    by_hand = stage.model.state_dict()["0.weight"].clone()
    train(replace(stage, after_step=after_step), tmp_path, 0, CPU)
    for step, weight in enumerate(weights):
        decay = min(0.6, (1 + step) / (10 + step))
        by_hand = decay * by_hand + (1 - decay) * weight
    ema = end_of(tmp_path)[0]["ema"]
    torch.testing.assert_close(ema["0.weight"], by_hand)
    assert float(ema["steps_seen"]) == STEPS


def test_a_step_is_adamw_on_the_clipped_gradient(tmp_path: Path) -> None:
    changes = {"train_steps": 1, "warmup_steps": 1, "lr_decay": "none", "grad_clip": 0.01, "ema_decay": 0.0}
    stage, twin = toy(**changes), toy(**changes)
    optimizer = torch.optim.AdamW(twin.model.parameters(), lr=0.05, weight_decay=0.1)
    torch.manual_seed(torch_generator(0, "toy/dropout", 0, 0).initial_seed())
    twin.model.train()
    twin.loss(twin.model, twin.draw(0))[0].backward()  # type: ignore[no-untyped-call]
    size = math.sqrt(sum(float(p.grad.square().sum()) for p in twin.model.parameters() if p.grad is not None))
    assert size > 0.01
    for p in twin.model.parameters():
        assert p.grad is not None
        p.grad *= 0.01 / size
    optimizer.step()
    train(stage, tmp_path, 0, CPU)
    trained = end_of(tmp_path)[0]["model"]
    for name, parameter in twin.model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-3, atol=1e-5)
    assert end_of(tmp_path)[1][0]["grad_norm"] == pytest.approx(size, rel=1e-4)  # before clipping


def test_the_learning_rate_warms_up_linearly_and_falls_by_half_a_cosine() -> None:
    constant, cosine = (settings(train_steps=24, warmup_steps=4, lr=0.2, lr_decay=decay) for decay in ("none", "cosine"))
    for section in (constant, cosine):
        assert [learning_rate(section, step) for step in range(5)] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2])
    assert learning_rate(constant, 23) == 0.2
    assert learning_rate(cosine, 9) == pytest.approx(0.1 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(cosine, 14) == pytest.approx(0.1)
    assert learning_rate(cosine, 23) == pytest.approx(0.1 * (1 + math.cos(math.pi * 19 / 20)))
    assert learning_rate(cosine, 24) == pytest.approx(0, abs=1e-12)
    assert learning_rate(settings(warmup_steps=0, lr=0.2), 0) == pytest.approx(0.2)
    assert learning_rate(settings(train_steps=3, warmup_steps=5, lr=0.2), 2) == pytest.approx(0.12)  # never reaches lr


def test_the_rate_in_the_metrics_is_that_of_the_step(tmp_path: Path) -> None:
    train(toy(), tmp_path, 0, CPU)
    assert [line["lr"] for line in end_of(tmp_path)[1]] == pytest.approx([learning_rate(settings(), step) for step in range(STEPS)])


def test_figures_are_logged_every_few_steps_and_at_the_end_and_every_step_is_reported(tmp_path: Path) -> None:
    heard: list[tuple[str, int, int, bool]] = []
    train(toy(log_every_steps=3), tmp_path, 0, CPU, lambda what, done, total, figures: heard.append((what, done, total, bool(figures))))
    assert [line["step"] for line in end_of(tmp_path)[1]] == [3, 6, 7]
    assert heard == [("toy", done, STEPS, done in (3, 6, 7)) for done in range(1, STEPS + 1)]


def test_sample_grids_are_drawn_with_the_ema_weights_and_leave_training_alone(tmp_path: Path) -> None:
    drawn: list[Tensor] = []

    def sample(model: nn.Module, step: int) -> Tensor:
        assert not model.training
        drawn.append(model.state_dict()["0.weight"].clone())
        assert step in (2, 4, 6)
        return torch.zeros(16, 1, 8, 8)

    stage = toy(sample_every_steps=2, save_every_steps=2)
    train(replace(stage, sample=sample), tmp_path / "grids", 0, CPU)
    train(toy(), tmp_path / "whole", 0, CPU)
    assert_same_end(tmp_path / "whole", tmp_path / "grids")
    assert sorted(p.name for p in (tmp_path / "grids" / "samples").iterdir()) == [f"{step:09d}.png" for step in (2, 4, 6)]
    with Image.open(tmp_path / "grids" / "samples" / "000000006.png") as image:
        assert image.width >= 8 * 8
    found = store.load_checkpoint(tmp_path / "grids")
    assert found is not None
    sixth = json.loads((tmp_path / "grids" / "step-000000006" / "state.json").read_text())
    assert sixth["step"] == 6
    assert torch.equal(drawn[-1], store.read_tensors(tmp_path / "grids" / "step-000000006" / "ema.safetensors")["0.weight"])
