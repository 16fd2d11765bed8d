"""The training loop: exact resume after any end, EMA, learning rate, steps that are not finite, signals."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engines import store
from engines.data.batches import ALL, DRAWN_AHEAD, Batch, drawn_ahead, torch_generator
from engines.errors import DataError, Interrupted, NumericsError, StorageError
from engines.interrupt import catch_signals
from engines.recipe import StageSection
from engines.training.distributed import ALONE, World
from engines.training.loop import Forward, Stage, is_complete, measure, result_of, train
from engines.training.sinks import Sinks
from engines.training.trainer import GuardedAdamW, Trainer, learning_rate

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

    stage = toy(save_every_steps=2)
    train(replace(stage, sample=sample, sample_every_steps=2), tmp_path / "grids", 0, CPU)
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


# --------------------------------------------------------------------------------------- workers, micro-batches, held-out images


def test_any_number_of_threads_draws_the_same_run(tmp_path: Path) -> None:
    for workers in (0, 1, 3):
        train(toy(workers=workers), tmp_path / str(workers), 0, CPU)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("draw")]
    assert_same_end(tmp_path / "0", tmp_path / "1")
    assert_same_end(tmp_path / "0", tmp_path / "3")


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_what_fails_in_a_thread_fails_in_its_step_and_no_thread_is_left(workers: int, tmp_path: Path) -> None:
    stage = toy(workers=workers, save_every_steps=1)

    def draw(step: int, rows: slice = ALL) -> Batch:
        if step == 4:
            raise DataError("a broken image", "mend it")
        return stage.draw(step, rows)

    with pytest.raises(DataError, match="a broken image"):
        train(replace(stage, draw=draw), tmp_path, 0, CPU)
    found = store.load_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 4
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("draw")]


def test_batches_are_drawn_ahead_by_no_more_than_is_bounded() -> None:
    drawn: list[int] = []
    asked_at: list[int] = []
    with drawn_ahead(lambda step: drawn.append(step) or step, 0, 50, workers=2) as batches:  # type: ignore[func-returns-value]
        for step in range(10):
            asked_at.append(len(drawn))
            assert next(batches) == step
            assert len(drawn) <= step + 2 * DRAWN_AHEAD
    assert max(drawn) < 10 + 2 * DRAWN_AHEAD


def without_dropout(stage: Stage) -> Stage:
    next(layer for layer in stage.model.modules() if isinstance(layer, nn.Dropout)).p = 0.0
    return stage


def test_micro_batches_make_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    for parts in (1, 2, 4):
        train(without_dropout(toy(accumulate=parts)), tmp_path / str(parts), 0, CPU)
    whole, lines = end_of(tmp_path / "1")
    for parts in (2, 4):
        tensors, others = end_of(tmp_path / str(parts))
        for name in ("model", "ema"):
            for key, value in tensors[name].items():
                torch.testing.assert_close(value, whole[name][key], rtol=1e-4, atol=1e-5)
        for line, other in zip(lines, others, strict=True):
            assert other == pytest.approx(line, rel=1e-3)


def test_a_part_that_is_not_finite_skips_the_whole_step_for_buffers_too(tmp_path: Path) -> None:
    calls: list[int] = []

    def hook(step: int, loss: Tensor) -> Tensor:
        calls.append(step)
        return loss * math.nan if calls.count(2) == 1 and step == 2 else loss  # the first of two parts

    train(toy(hook, accumulate=2), tmp_path, 0, CPU)
    assert calls == [step for step in range(STEPS) for _ in range(2)]
    assert [line["skipped_steps"] for line in end_of(tmp_path)[1]] == [0, 0, 1, 1, 1, 1, 1]
    assert float(end_of(tmp_path)[0]["model"]["steps_seen"]) == STEPS - 1


VALUES = (9.0, 5.0, 3.0, 4.0, 2.0, 6.0, 7.0, 8.0)  # the held-out figure after so many steps


def judged(hook: Hook = lambda _, loss: loss, every: int = 1, patience: int = 2, **changes: Any) -> Stage:
    stage = toy(hook, **changes)
    return replace(
        stage,
        held_out=lambda model: {"held_out": VALUES[int(model.steps_seen)], "held_out_few": 1.0},  # type: ignore[arg-type, index]
        held_out_every_steps=every,
        patience=patience,
    )


def test_a_stage_without_a_new_best_stops_and_its_result_is_the_best_ema(tmp_path: Path) -> None:
    emas: dict[int, dict[str, Tensor]] = {}

    def report(_what: str, done: int, total: int, figures: Mapping[str, float]) -> None:  # before the checkpoint of `done` is written
        if done > 1:
            emas[done - 1] = end_of(tmp_path)[0]["ema"]
        assert figures["held_out"] == VALUES[done]
        assert total == (STEPS if done < 6 else 6)

    first = judged(save_every_steps=1)
    assert train(first, tmp_path, 0, CPU, report) == 6
    found = store.load_checkpoint(tmp_path)
    assert found is not None
    assert {key: found.state[key] for key in ("best_held_out", "best_step", "evaluations_since_best", "stopped_at")} == {
        "best_held_out": 2.0,
        "best_step": 4,
        "evaluations_since_best": 2,
        "stopped_at": 6,
    }
    assert is_complete(found, first.settings)
    again = judged(killed(0))
    assert train(again, tmp_path, 0, CPU) == 0
    for model in (first.model, again.model):
        assert all(torch.equal(value, emas[4][name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, emas[4][name]) for name, value in result_of(found).items())
    assert [line["held_out"] for line in end_of(tmp_path)[1]] == list(VALUES[1:7])


def test_without_patience_the_figure_is_only_logged_and_the_last_step_is_judged_too(tmp_path: Path) -> None:
    train(judged(every=3, patience=0, log_every_steps=100), tmp_path, 0, CPU)
    tensors, lines = end_of(tmp_path)
    assert set(tensors) == {"model", "ema", "optimizer"}
    assert [(line["step"], line["held_out"], line["held_out_few"]) for line in lines] == [(n, VALUES[n], 1.0) for n in (3, 6, 7)]
    train(toy(log_every_steps=1), tmp_path / "plain", 0, CPU)
    plain = end_of(tmp_path / "plain")[0]
    assert all(torch.equal(value, plain["ema"][name]) for name, value in tensors["ema"].items())  # judging changes nothing


def test_with_patience_left_at_the_last_step_the_best_is_the_result_all_the_same(tmp_path: Path) -> None:
    stage = judged(patience=9, save_every_steps=1)
    assert train(stage, tmp_path, 0, CPU) == STEPS
    found = store.load_checkpoint(tmp_path)
    assert found is not None
    assert found.state["best_step"] == 4
    assert "stopped_at" not in found.state
    assert all(torch.equal(value, found.groups["best"][name]) for name, value in stage.model.state_dict().items())


def test_a_stage_in_which_nothing_is_held_out_is_never_judged(tmp_path: Path) -> None:
    train(replace(judged(), held_out=lambda _: {}), tmp_path, 0, CPU)
    assert set(end_of(tmp_path)[0]) == {"model", "ema", "optimizer"}


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted runs, one for each number of micro-batches."""
    root = tmp_path_factory.mktemp("whole")
    for parts in (1, 2, 4):
        train(judged(accumulate=parts), root / str(parts), 0, CPU)
    return root


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 5), st.sampled_from((1, 2, 4)), st.tuples(st.integers(0, 3), st.integers(0, 3)), st.booleans())
def test_an_interruption_anywhere_between_evaluations_and_workers_ends_bit_equal(
    whole_runs: Path, step: int, parts: int, workers: tuple[int, int], kill: bool
) -> None:
    sent: list[int] = []

    def signaled(now: int, loss: Tensor) -> Tensor:
        if now == step and not sent:  # once, not once a micro-batch
            sent.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        with pytest.raises(Killed if kill else Interrupted):
            train(judged(killed(step) if kill else signaled, accumulate=parts, workers=workers[0]), run, 0, CPU)
        train(judged(accumulate=parts, workers=workers[1]), run, 0, CPU)
        assert_same_end(whole_runs / str(parts), run)


# ------------------------------------------------------------------------------------------------------------ on the device


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for the device: values read back, shapes that depend on values."""

    WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.split(".")[0]
        if name in self.WAITING:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def test_a_step_reads_nothing_back_from_the_device() -> None:
    stage = toy(lambda _step, loss: loss, accumulate=2)
    stage = replace(stage, loss=lambda forward, batch: ((forward(batch.noise) - 1).square().mean(), {"rows": batch.noise}))
    trainer = Trainer(stage, 0, CPU, ALONE)
    with Reads() as reads:
        for step in range(2):
            trainer.step(step, stage.draw(step))
    assert reads.seen == []
    with Reads() as reads:
        assert bool(torch.ones(1) > 0)
    assert reads.seen  # and a read would be seen


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_optimizer_changes_nothing_where_found_inf_is_one_and_divides_by_the_scale_elsewhere(bad: float) -> None:
    torch.manual_seed(0)
    mine, plain = ([nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(n))) for n in (3, 1000)] for _ in range(2))
    guarded = GuardedAdamW(mine, lr=0.1, weight_decay=0.3, fused=True)
    reference = torch.optim.AdamW(plain, lr=0.1, weight_decay=0.3)
    for step in range(6):
        for p, q in zip(mine, plain, strict=True):
            gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            p.grad, q.grad = gradient * 4, gradient
        skipped = step in (0, 3)
        if skipped:
            assert mine[1].grad is not None
            mine[1].grad[7] = bad
        guarded.grad_scale, guarded.found_inf = torch.tensor(4.0), torch.tensor(float(skipped))
        before = [p.detach().clone() for p in mine]
        moments = [{key: value.clone() for key, value in state.items()} for state in guarded.state.values()]
        guarded.step()
        if skipped:
            assert all(torch.equal(p, q) for p, q in zip(mine, before, strict=True))
            for state, old in zip(guarded.state.values(), moments, strict=False):
                assert all(torch.equal(state[key], old[key]) for key in old)
            assert all(float(state["step"]) == max(step - 1, 0) for state in guarded.state.values())
        else:
            reference.step()
    for p, q in zip(mine, plain, strict=True):
        torch.testing.assert_close(p, q)


def test_too_many_skipped_steps_are_found_though_good_ones_follow_before_anyone_looks(tmp_path: Path) -> None:
    bad = spoiled(math.nan, 0, 1, 2)
    quiet = {"log_every_steps": 100, "save_every_steps": 100, "max_nonfinite_steps": 3, "train_steps": 9}
    with pytest.raises(NumericsError, match="toy: 3 steps in a row were not finite, up to step 3"):
        train(toy(bad, **quiet), tmp_path, 0, CPU)
    late = spoiled(math.nan, 1, 2, 3)  # the last of them between two looks, which come every third step
    with pytest.raises(NumericsError, match="up to step 4"):
        train(toy(late, **quiet), tmp_path, 0, CPU)
    assert store.load_checkpoint(tmp_path) is None


# -------------------------------------------------------------------------------------------------------------- figures


def test_the_time_left_is_told_with_the_figures_and_not_kept(tmp_path: Path) -> None:
    heard: list[dict[str, float]] = []
    train(toy(log_every_steps=2), tmp_path, 0, CPU, lambda _what, _done, _total, figures: heard.append(dict(figures)))
    left = [figures["seconds_left"] for figures in heard if figures]
    assert len(left) == 4
    assert left[0] > 0
    assert left[-1] == 0
    assert all("seconds_left" not in line for line in end_of(tmp_path)[1])


def test_sinks_are_given_the_figures_and_the_grids(tmp_path: Path) -> None:
    class Memory:
        def __init__(self) -> None:
            self.figures: list[tuple[str, int, dict[str, float]]] = []
            self.grids: list[tuple[str, int, bytes]] = []

        def write(self, stage: str, step: int, figures: Mapping[str, float]) -> None:
            self.figures.append((stage, step, dict(figures)))

        def image(self, stage: str, step: int, png: bytes) -> None:
            self.grids.append((stage, step, png))

        def close(self) -> None:
            raise AssertionError("whoever opened a sink closes it")

    memory = Memory()
    stage = replace(toy(), sample=lambda _model, _step: torch.zeros(16, 1, 8, 8), sample_every_steps=3)
    train(stage, tmp_path, 0, CPU, sinks=Sinks({"memory": memory}))
    lines = store.read_json_lines(tmp_path / "metrics.jsonl")
    assert [{"step": step, **figures} for _, step, figures in memory.figures] == lines
    grids = [("toy", step, (tmp_path / "samples" / f"{step:09d}.png").read_bytes()) for step in (3, 6)]
    assert memory.grids == grids


def test_measuring_a_step_leaves_the_stage_as_it_was() -> None:
    stage = toy()
    before = {name: value.clone() for name, value in stage.model.state_dict().items()}
    assert 0 < measure(stage, CPU) < 5
    assert all(torch.equal(value, before[name]) for name, value in stage.model.state_dict().items())


def test_no_steps_are_a_stage_whose_result_is_its_start(tmp_path: Path) -> None:
    stage = toy()
    nothing = replace(stage, settings=stage.settings.model_copy(update={"train_steps": 0}))
    start = {name: value.clone() for name, value in stage.model.state_dict().items()}
    for _ in range(2):
        assert train(nothing, tmp_path, 0, CPU) == 0
        found = store.load_checkpoint(tmp_path)
        assert found is not None
        assert found.step == 0
        assert all(torch.equal(value, start[name]) for name, value in found.groups["ema"].items())


def test_a_process_that_sees_another_checkpoint_than_the_others_does_not_train_beside_them(tmp_path: Path) -> None:
    class Behind(World):
        def largest(self, value: int) -> int:
            return value + 3

    with pytest.raises(StorageError, match=r"at step 0, another at step 3") as refused:
        train(toy(), tmp_path, 0, CPU, world=Behind())
    assert "a disk that all processes share" in refused.value.remedy
    assert not list(tmp_path.iterdir())
