"""A whole run: three stages in order, exact resume, refusals, signals and locks as a user meets them."""

from __future__ import annotations

import json
import os
import re
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
from engines.errors import ConflictError, DataError, NumericsError, StorageError, UsageError
from engines.networks import pretrained
from engines.recipe import Recipe, load, read
from engines.training import calibration, diffusion, loop, stages
from engines.training import guide as guides
from engines.training.stages import load_guide, load_unet, train_run

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
        "cost.jsonl",
        "source",
        "target",
        "guide",
    }
    assert store.read_json(tiny_run / "classes.json") == data.table()
    assert {line["what"] for line in store.read_json_lines(tiny_run / "cost.jsonl")} == {"train.source", "train.target", "train.guide"}
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


def with_settings(path: Path, *overrides: str) -> store.RunFolder:
    """The run in a folder with some settings changed, as `diffrc train --run DIR --set ...` opens it."""
    return store.create_run(path, read(path / "recipe.toml", overrides))


def test_a_changed_guide_section_trains_the_guide_alone_and_changed_back_nothing(tiny_copy: Path, data: LongTail) -> None:
    before, told = tensors(tiny_copy), list[str]()
    assert train_run(with_settings(tiny_copy, "guide.tau=0.1"), data, CPU, tell=told.append) == {"source": 0, "target": 0, "guide": 4}
    [sentence] = told
    assert re.fullmatch(r"guide: guide\.tau = 0\.07 -> 0\.1; trains again \(the old one is kept in stale/guide-[0-9a-f]{8}\)", sentence)
    after = tensors(tiny_copy)
    assert {name: data for name, data in after.items() if name.startswith(("source/", "target/"))} == {
        name: data for name, data in before.items() if not name.startswith("guide/")
    }
    assert after["guide/step-000000004/ema.safetensors"] != before["guide/step-000000004/ema.safetensors"]
    [kept] = (tiny_copy / "stale").iterdir()
    assert {path.name for path in kept.iterdir()} >= {"metrics.jsonl", "accuracy.json"}, "what belongs to its weights goes with them"
    assert train_run(with_settings(tiny_copy, "guide.tau=0.07"), data, CPU) == {"source": 0, "target": 0, "guide": 0}
    assert {name: data for name, data in tensors(tiny_copy).items() if not name.startswith("stale/")} == before


def test_a_stage_of_more_steps_goes_on_and_ends_as_one_that_was_asked_for_them_at_once(
    tiny_run: Path, data: LongTail, tmp_path: Path
) -> None:
    ends = []
    for lengths in ((4, 6), (6,)):
        path = tmp_path / f"in {len(lengths)}"
        shutil.copytree(tiny_run, path)
        shutil.rmtree(path / "guide")
        for steps in lengths:
            trained = train_run(with_settings(path, "guide.lr_decay=none", f"guide.train_steps={steps}"), data, CPU)
        ends.append((trained, tensors(path)))
    (longer, ours), (anew, theirs) = ends
    assert (longer, anew) == ({"source": 0, "target": 0, "guide": 2}, {"source": 0, "target": 0, "guide": 6})
    assert ours == theirs


def test_a_guide_that_was_trained_on_and_killed_before_it_was_judged_is_judged_at_the_next_train(
    tiny_copy: Path, data: LongTail, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    fast = ("guide.lr_decay=none", "guide.lr=0.01", "guide.warmup_steps=0")
    train_run(with_settings(tiny_copy, *fast), data, CPU)
    table = tiny_copy / "guide" / calibration.TABLE
    before, longer = table.read_bytes(), with_settings(tiny_copy, *fast, "guide.train_steps=6")
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            train_run(longer, data, CPU)
    assert train_run(longer, data, CPU) == {"source": 0, "target": 0, "guide": 0}
    assert table.read_bytes() != before
    written = table.stat().st_mtime_ns
    train_run(longer, data, CPU)
    assert table.stat().st_mtime_ns == written


def test_a_stale_stage_is_not_read_back_and_the_remedy_is_to_train(tiny_copy: Path) -> None:
    run = with_settings(tiny_copy, "guide.tau=0.1")
    load_unet(run)
    with pytest.raises(UsageError, match=r"the guide of .* is stale: guide\.tau = 0\.07 -> 0\.1") as refused:
        load_guide(run)
    assert refused.value.remedy == f"diffrc train --run {tiny_copy}"
    run = with_settings(tiny_copy, "unet.dropout=0.3")
    for model in ("source", "target"):
        with pytest.raises(UsageError, match=rf"the {model} of .* is stale: unet\.dropout"):
            load_unet(run, model)  # type: ignore[arg-type]


def test_each_network_starts_from_the_seed_and_its_name_alone(tiny_run: Path, data: LongTail) -> None:
    recipe = store.open_run(tiny_run).recipe
    wider = read(tiny_run / "recipe.toml", ("unet.model_channels=32", "unet.num_head_channels=32"))
    other = read(tiny_run / "recipe.toml", ("seed=1",))

    def start(settings: Recipe) -> tuple[str, str]:
        torch.rand(3)
        return weights_sha256(stages.new_unet(settings, 10)), weights_sha256(stages.new_guide(settings, data.counts))

    assert start(recipe) == start(recipe)
    assert start(recipe)[1] == start(wider)[1]
    assert not set(start(recipe)) & set(start(other))


def test_a_pretrained_source_of_no_steps_is_its_file_and_the_target_goes_on_from_there(
    tiny_run: Path, data: LongTail, tmp_path: Path
) -> None:
    trained, file, told = load_unet(store.open_run(tiny_run), "source"), tmp_path / "weights.safetensors", list[str]()
    card = pretrained.WeightsCard(architecture=trained.architecture, out_channels=2, classes=10, null_label=True)
    pretrained.write(file, trained.state_dict(), card)
    recipe = read(tiny_run / "recipe.toml", (f"source.pretrained={file}", "source.train_steps=0"))
    run = store.create_run(tmp_path / "run", recipe)
    assert train_run(run, data, CPU, tell=told.append) == {"source": 0, "target": 4, "guide": 4}
    assert told == ["the pre-trained weights do not say which noise schedule they were trained on: the recipe's is assumed"]
    assert weights_sha256(load_unet(run, "source")) == weights_sha256(trained)
    assert weights_sha256(load_unet(run)) == weights_sha256(load_unet(store.open_run(tiny_run)))
    file.unlink()
    told.clear()
    assert train_run(run, data, CPU, tell=told.append) == {"source": 0, "target": 0, "guide": 0}
    assert told == [f"source.pretrained {file} is not there: it is taken to be the file that this run's source started from"]
    longer = with_settings(run.path, "source.train_steps=2", "source.lr_decay=none")
    with pytest.raises(DataError, match=r"weights\.safetensors"):  # it would train anew, from a file that is gone
        train_run(longer, data, CPU)
    pretrained.write(file, trained.state_dict(), card)
    assert train_run(longer, data, CPU) == {"source": 2, "target": 4, "guide": 0}
    assert weights_sha256(load_unet(store.open_run(run.path), "source")) != weights_sha256(trained)


def test_a_guide_that_starts_from_the_target_takes_its_ema_and_follows_its_settings(
    tiny_copy: Path, data: LongTail, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = guides.take_encoder, list[str]()

    def watched(guide: Any, unet: Any) -> int:
        seen.append(weights_sha256(unet.cpu()))
        before = {name: value.clone() for name, value in guide.encoder.state_dict().items()}
        taken = real(guide, unet)
        after = guide.encoder.state_dict()
        assert taken > 20
        assert sum(not torch.equal(before[name], after[name]) for name in after) > 10
        return taken

    monkeypatch.setattr(guides, "take_encoder", watched)
    unet = store.open_run(tiny_copy).recipe.unet
    same = [f"guide.{key}={list(v) if isinstance(v := getattr(unet, key), tuple) else v}" for key in ("channel_mult", "num_res_blocks")]
    run = with_settings(tiny_copy, *same, f"guide.attention_resolutions={list(unet.attention_resolutions)}", "guide.init_from=target")
    assert train_run(run, data, CPU) == {"source": 0, "target": 0, "guide": 4}
    assert seen == [weights_sha256(load_unet(run))]
    load_guide(run)
    changed = with_settings(tiny_copy, "target.gamma=0.3")
    with pytest.raises(UsageError, match=r"the guide of .* is stale: target\.gamma"):
        load_guide(changed)


def test_a_pretrained_file_that_cannot_be_used_is_refused_before_training(tiny_run: Path, data: LongTail, tmp_path: Path) -> None:
    run = store.create_run(tmp_path / "run", read(tiny_run / "recipe.toml", (f"source.pretrained={tmp_path / 'no.safetensors'}",)))
    with pytest.raises(DataError, match=r"no\.safetensors"):
        train_run(run, data, CPU)
    assert not (run.path / "source").exists()


@pytest.mark.parametrize("group", ["model", "ema"])
def test_a_checkpoint_whose_tensors_do_not_fit_is_named_with_what_differs(group: str, tiny_copy: Path, data: LongTail) -> None:
    found = store.load_checkpoint(tiny_copy / "guide")
    assert found is not None
    groups = {**found.groups, group: {**found.groups[group], "prototypes": torch.zeros(7, 16)}}
    store.save_checkpoint(tiny_copy / "guide", store.Checkpoint(found.step, groups, found.state))
    told = rf"guide/step-000000004/{group}\.safetensors does not fit .*\(prototypes: \[7, 16\] float32 there, \[10, 16\] float32 here\)"
    with pytest.raises(DataError, match=told):
        train_run(store.open_run(tiny_copy), data, CPU)
    if group == "ema":
        with pytest.raises(DataError, match=told):
            load_guide(store.open_run(tiny_copy))


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
    assert set(run.cost()) == {"train.source"}


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


def test_changed_data_are_refused_with_exit_5_and_the_keys_name(tiny_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("train", "--run", str(tiny_copy), "--set", "data.imbalance=7.0") == 5
    message = capsys.readouterr().err
    assert "data.imbalance = 8.0 there, 7.0 now" in message
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
    assert "train.source" in store.open_run(run).cost()
    # As far as it came, it is the tiny run: the same recipe but for its length and constant learning rate.
    pairs = zip(store.read_json_lines(run / "source" / "metrics.jsonl"), metrics(tiny_run), strict=False)
    both = [(ours["loss"], theirs["loss"]) for ours, theirs in pairs]
    assert both
    assert all(ours == theirs for ours, theirs in both[:4])


def test_the_embedded_default_is_what_the_tiny_run_is_made_of(tiny_run: Path, tiny_settings: tuple[str, ...]) -> None:
    assert store.open_run(tiny_run).recipe == load(embedded()["digits-lt"].read_text(encoding="utf-8"), tiny_settings)
