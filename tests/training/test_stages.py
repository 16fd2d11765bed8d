"""A whole run: three stages in order, exact resume, refusals, signals and locks as a user meets them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffrc_cli.app import main
from diffrc_cli.recipe import embedded
from diffrc_cli.train import recipe_of_run
from engines import store
from engines.backends.base import weights_sha256
from engines.data.longtail import LongTail, prepare
from engines.errors import ConflictError, EngineError, NumericsError, StorageError, UsageError
from engines.recipe import Recipe, load, read
from engines.training import diffusion, loop, stages
from engines.training.stages import choose_device, load_guide, load_unet, train_run

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")


def tensors(run: Path) -> dict[str, bytes]:
    """Bytes of every tensor file of a run, by path."""
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in sorted(run.rglob("*.safetensors"))}


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [line for stage in ("source", "target", "guide") for line in store.read_json_lines(run / stage / "metrics.jsonl")]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


@pytest.fixture(scope="module")
def data(tiny_run: Path) -> LongTail:
    return prepare(store.open_run(tiny_run).recipe.data, None)


def test_a_run_folder_explains_itself(tiny_run: Path, data: LongTail) -> None:
    assert {path.name for path in tiny_run.iterdir()} - {".lock"} == {
        "recipe.toml",
        "classes.json",
        "environment.json",
        "cost.json",
        "source",
        "target",
        "guide",
    }
    assert store.read_json(tiny_run / "classes.json") == data.table()
    assert set(store.read_json(tiny_run / "cost.json")) == {"train.source", "train.target", "train.guide"}
    for stage in ("source", "target", "guide"):
        assert sorted(path.name for path in (tiny_run / stage).glob("step-*")) == ["step-000000002", "step-000000004"]
        assert [line["step"] for line in store.read_json_lines(tiny_run / stage / "metrics.jsonl")] == [1, 2, 3, 4]
    accuracy = store.read_json(tiny_run / "guide" / "accuracy.json")
    assert set(accuracy) == {"train", "test"}
    assert {len(accuracy["test"][key]) for key in ("t", "accuracy", "confidence")} == {11}


def test_the_sizes_of_both_losses_and_of_both_entropies_are_logged(tiny_run: Path) -> None:
    for line in store.read_json_lines(tiny_run / "target" / "metrics.jsonl"):
        assert {"l_base", "l_vlb", "l_pair", "entropy_source", "entropy_target"} <= set(line)
        assert line["entropy_target"] >= line["entropy_source"] - 1e-4  # Eq. 8 flattens


def test_a_complete_run_trains_no_step_and_changes_no_weight(tiny_copy: Path, data: LongTail) -> None:
    before = tensors(tiny_copy)
    assert train_run(store.open_run(tiny_copy), data, CPU) == {"source": 0, "target": 0, "guide": 0}
    assert tensors(tiny_copy) == before


def test_a_complete_run_needs_no_space(tiny_copy: Path, data: LongTail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    train_run(store.open_run(tiny_copy), data, CPU)
    shutil.rmtree(tiny_copy / "guide")
    with pytest.raises(StorageError, match="needs about"):
        train_run(store.open_run(tiny_copy), data, CPU)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("stage", "step"), [("source", 3), ("target", 0), ("guide", 2)])
def test_a_run_killed_in_any_stage_ends_bit_equal_to_the_tiny_run(
    stage: str, step: int, tiny_run: Path, data: LongTail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.Trainer.step

    def killed(self: Any, now: int, batch: Any) -> Any:
        if (self.stage.name, now) == (stage, step):
            raise Killed
        return real(self, now, batch)

    run = store.create_run(tmp_path / "run", store.open_run(tiny_run).recipe)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "step", killed)
        with pytest.raises(Killed):
            train_run(run, data, CPU)
    torch.manual_seed(99)  # the state of torch's own generator plays no part
    train_run(run, data, CPU)
    assert tensors(run.path) == tensors(tiny_run)
    assert metrics(run.path) == metrics(tiny_run)
    assert store.read_json(run.path / "guide" / "accuracy.json") == store.read_json(tiny_run / "guide" / "accuracy.json")


def test_the_target_starts_as_the_sources_ema(tiny_copy: Path, data: LongTail, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = stages.target_stage, []

    def watched(recipe: Recipe, tail: LongTail, source: Any, unet: Any, device: torch.device) -> Any:
        seen.append((weights_sha256(source), weights_sha256(unet)))
        assert source is not unet
        return real(recipe, tail, source, unet, device)

    monkeypatch.setattr(stages, "target_stage", watched)
    train_run(store.open_run(tiny_copy), data, CPU)
    source = weights_sha256(load_unet(store.open_run(tiny_copy), "source"))
    assert seen == [(source, source)]
    assert weights_sha256(load_unet(store.open_run(tiny_copy), "target")) != source


def test_networks_read_back_are_the_ema_in_evaluation_mode(tiny_run: Path) -> None:
    run = store.open_run(tiny_run)
    for stage, network in (("target", load_unet(run)), ("source", load_unet(run, "source")), ("guide", load_guide(run))):
        found = store.load_checkpoint(run.stage(stage))
        assert found is not None
        assert all(torch.equal(value, found.groups["ema"][name]) for name, value in network.state_dict().items())
        assert not network.training


def test_an_unfinished_stage_is_not_read_back(tiny_copy: Path) -> None:
    shutil.rmtree(tiny_copy / "target" / "step-000000004")
    with pytest.raises(UsageError, match=r"the target of .* stands at step 2 of 4"):
        load_unet(store.open_run(tiny_copy))
    shutil.rmtree(tiny_copy / "guide")
    with pytest.raises(UsageError, match=r"the guide of .* is not trained"):
        load_guide(store.open_run(tiny_copy))


def test_other_data_are_refused_before_anything_is_trained(tiny_copy: Path) -> None:
    run = store.open_run(tiny_copy)
    other = prepare(run.recipe.data.model_copy(update={"profile_seed": 5}), None)
    with pytest.raises(ConflictError, match=r"other data \(kept_sha256 differ\)"):
        train_run(run, other, CPU)


@pytest.mark.parametrize("conditional", ["false", "true"])
def test_a_preview_grid_is_written_by_both_diffusion_stages(
    conditional: str, tiny_run: Path, data: LongTail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusion, "PREVIEW_STEPS", 2)
    short = [f"{stage}.{key}" for stage in ("source", "target") for key in ("train_steps=1", "sample_every_steps=1")]
    recipe = read(tiny_run / "recipe.toml", (*short, f"unet.class_cond={conditional}"))
    source, target = diffusion.build_unet(recipe, 10), diffusion.build_unet(recipe, 10)
    loop.train(stages.source_stage(recipe, data, source, CPU), tmp_path / "source", 0, CPU)
    loop.train(stages.target_stage(recipe, data, source, target, CPU), tmp_path / "target", 0, CPU)
    for stage in ("source", "target"):
        with Image.open(tmp_path / stage / "samples" / "000000001.png") as image:
            assert min(image.size) >= 8 * 8  # a grid of 8 x 8 images of 8 px
    y = torch.tensor([3, 7])
    grid = diffusion.preview(source.eval(), diffusion.training_schedule(recipe, CPU), y if source.classes else None, 0)
    assert grid.shape == (64, 1, 8, 8)
    assert torch.equal(grid, diffusion.preview(source, diffusion.training_schedule(recipe, CPU), y if source.classes else None, 0))


def test_a_loss_that_stays_not_finite_leaves_no_checkpoint_and_its_cost_is_counted(
    tiny_run: Path, data: LongTail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stages.source_stage

    def spoiled(*a: Any) -> Any:
        stage = real(*a)
        return replace(stage, loss=lambda forward, batch: (stage.loss(forward, batch)[0] * float("nan"), {}), after_step=None)

    monkeypatch.setattr(stages, "source_stage", spoiled)
    run = store.create_run(tmp_path / "run", read(tiny_run / "recipe.toml", ("source.max_nonfinite_steps=2", "source.save_every_steps=1")))
    with pytest.raises(NumericsError, match="source: 2 steps in a row were not finite"):
        train_run(run, data, CPU)
    assert set(store.read_json(run.path / "cost.json")) == {"train.source"}


def test_a_full_disk_is_told_with_the_checkpoints_own_bytes(
    tiny_run: Path, data: LongTail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = store.create_run(tmp_path / "run", store.open_run(tiny_run).recipe)
    real = os.fsync

    def full(descriptor: int) -> None:
        if "step-" in os.readlink(f"/proc/self/fd/{descriptor}") or (run.path / "full").exists():  # noqa: PTH115
            (run.path / "full").touch()
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"step-000000002.*No space left") as failure:
            train_run(run, data, CPU)
    assert int(failure.value.remedy.split()[3].replace(",", "")) > 10_000
    (run.path / "full").unlink()
    train_run(run, data, CPU)
    assert tensors(run.path) == tensors(tiny_run)


def test_a_device_is_what_was_named_or_an_error() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda")
    with pytest.raises(UsageError, match="'tpu'"):
        choose_device("tpu")
    with pytest.raises(EngineError, match="cuda:99"):
        choose_device("cuda:99")


# ------------------------------------------------------------------------------------------------------------ diffrc train


def test_data_lie_where_the_user_says_whatever_the_path_is_called(tmp_path: Path) -> None:
    for name in ("plain", "with 'quotes' and \"more\"", "\N{SNOWMAN}\N{GRINNING FACE}", "back\\slash", " blanks "):
        recipe, _ = recipe_of_run("folder", tmp_path / name, None, None)
        assert recipe.data.path == str(tmp_path / name)


def test_without_a_recipe_an_existing_runs_own_counts(tiny_copy: Path) -> None:
    recipe, path = recipe_of_run(None, None, tiny_copy, None)
    assert (recipe, path) == (store.open_run(tiny_copy).recipe, tiny_copy)
    assert recipe_of_run(None, None, tiny_copy, ["synth.steps=3"])[0].synth.steps == 3


def exit_code(*arguments: str) -> int:
    """Of the command, run in this process: torch is there already."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert isinstance(end.value.code, int)
    return end.value.code


def test_train_says_what_is_complete_and_what_comes_next(tiny_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("train", "--run", str(tiny_copy), "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"run": str(tiny_copy), "trained_steps": {"source": 0, "target": 0, "guide": 0}}
    assert exit_code("train", "--run", str(tiny_copy)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["source: complete already", "target: complete already", "guide: complete already"]
    assert lines[-1] == f"next: diffrc export --run {tiny_copy}"


def test_a_changed_recipe_is_refused_with_exit_5_and_the_keys_name(tiny_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("train", "--run", str(tiny_copy), "--set", "target.gamma=0.7") == 5
    message = capsys.readouterr().err
    assert "target.gamma = 0.1 there, 0.7 now" in message
    assert message.count("\n") == 2


def test_a_second_train_in_the_same_folder_is_refused_with_exit_5(tiny_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with store.locked(tiny_copy):
        assert exit_code("train", "--run", str(tiny_copy)) == 5
    assert "is in use by another diffrc process" in capsys.readouterr().err


def test_sigterm_commits_the_step_exits_143_and_the_same_command_continues(
    tiny_settings: tuple[str, ...], tiny_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    steps = 100_000
    words = [
        word for item in (*tiny_settings, f"source.train_steps={steps}", f"source.save_every_steps={steps}") for word in ("--set", item)
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "diffrc_cli", "train", "digits-lt", "--run", str(run), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    deadline = time.monotonic() + 100
    while not (run / "source" / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert out == ""
    assert "error: stopped by SIGTERM: source is saved at step" in err
    assert err.endswith("try:   the same command continues from there\n")
    found = store.load_checkpoint(run / "source")
    assert found is not None
    assert found.step == len(store.read_json_lines(run / "source" / "metrics.jsonl"))
    assert "train.source" in store.read_json(run / "cost.json")
    # As far as it came, it is the tiny run: the same recipe but for its length and constant learning rate.
    pairs = zip(store.read_json_lines(run / "source" / "metrics.jsonl"), metrics(tiny_run), strict=False)
    both = [(ours["loss"], theirs["loss"]) for ours, theirs in pairs]
    assert both
    assert all(ours == theirs for ours, theirs in both[:4])


def test_the_embedded_default_is_what_the_tiny_run_is_made_of(tiny_run: Path, tiny_settings: tuple[str, ...]) -> None:
    assert store.open_run(tiny_run).recipe == load(embedded()["digits-lt"].read_text(encoding="utf-8"), tiny_settings)
