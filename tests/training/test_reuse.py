"""Which stages are stale: by what their weights depend on, and by nothing else; kept aside, found again, whenever it is killed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import store
from engines.errors import DataError
from engines.recipe import Recipe, load
from engines.store import Checkpoint, save_checkpoint
from engines.training import reuse

STAGES = ("source", "target", "guide")
BASE = ("unet.num_head_channels=64", "target.holdout_fraction=0.1")
SHARED = ("unet.channel_mult=[1,2,2,2]", "guide.channel_mult=[1,2,2,2]", "guide.model_channels=128", "guide.num_res_blocks=2")
FROM_TARGET = (*SHARED, "guide.attention_resolutions=[16]", "guide.init_from=target")


def recipe(*overrides: str) -> Recipe:
    return load('name = "test"', (*BASE, *overrides))


def depend(before: tuple[str, ...], change: str, stages: tuple[str, ...] = STAGES) -> set[str]:
    """The stages whose digest a change of one key changes."""
    a, b = recipe(*before), recipe(*before, change)
    return {stage for stage in stages if digest(a, stage) != digest(b, stage)}


def digest(settings: Recipe, stage: str) -> str:
    return str(reuse.identity(reuse.made_of(settings, stage, "0"))["digest"])


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ("seed=1", {"source", "target", "guide"}),
        ("data.imbalance=50.0", {"source", "target", "guide"}),
        ("diffusion.noise_schedule=cosine", {"source", "target", "guide"}),
        ("diffusion.vlb_weight=0.0", {"source", "target"}),
        ("diffusion.timestep_sampler=stratified", {"source", "target"}),
        ("unet.dropout=0.2", {"source", "target"}),
        ("source.lr=1e-3", {"source", "target"}),
        ("target.gamma=0.2", {"target"}),
        ("guide.tau=0.1", {"guide"}),
        ("data.path=/elsewhere", set()),
        ("data.on_bad_image=skip", set()),
        ("data.quarantine=list.json", set()),
        ("synth.steps=7", set()),
        ("recognizer.lr=0.2", set()),
    ],
)
def test_a_stage_depends_on_its_own_settings_and_on_those_before_it(change: str, stages: set[str]) -> None:
    assert depend((), change) == stages


def test_the_kept_images_and_the_pretrained_file_count_and_its_path_does_not() -> None:
    ours = recipe("source.pretrained=a.safetensors")
    assert reuse.made_of(ours, "guide", "0") != reuse.made_of(ours, "guide", "1")
    assert reuse.made_of(ours, "target", "0", "a") != reuse.made_of(ours, "target", "0", "b")
    assert reuse.made_of(ours, "target", "0", "a") == reuse.made_of(recipe("source.pretrained=b.safetensors"), "target", "0", "a")
    assert reuse.made_of(ours, "guide", "0", "a") == reuse.made_of(ours, "guide", "0", "b")


def test_a_guide_that_starts_from_the_target_depends_on_all_that_the_target_depends_on() -> None:
    before = ("unet.dropout=0.2", "diffusion.vlb_weight=0.0", "source.train_steps=7", "target.gamma=0.2", "target.train_steps=7")
    for change in before:
        assert "guide" in depend(FROM_TARGET, change)
        assert "guide" not in depend(SHARED, change)


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_of_a_stage_counts_but_those_that_change_no_weight(stage: str) -> None:
    section = recipe().model_dump(mode="json")[stage]
    counted = {key.partition(".")[2] for key in reuse.made_of(recipe(), stage, "0") if key.startswith(f"{stage}.")}
    left_out = {"log_every_steps", "save_every_steps", "workers", "max_nonfinite_steps", "train_steps"}
    own = {"source": {"sample_every_steps"}, "target": {"sample_every_steps", "holdout_every_steps"}, "guide": set()}
    assert set(section) - counted == left_out | own[stage]


@pytest.mark.parametrize("stage", STAGES)
def test_a_longer_stage_is_the_same_one_unless_its_length_shows_in_its_steps(stage: str) -> None:
    change = f"{stage}.train_steps=999999"
    assert depend((), change, (stage,)) == set()
    assert depend((f"{stage}.lr_decay=cosine",), change, (stage,)) == {stage}
    if stage == "target":
        assert depend(("target.patience=3",), change, (stage,)) == {stage}
        assert depend(("target.patience=3",), "target.holdout_every_steps=7", (stage,)) == {stage}
    if stage == "source":
        assert depend((), change) == {"target"}, "which starts from where the source ends"


# ---------------------------------------------------------------------------------------------- folders of a tensor a stage


def train(path: Path, settings: Recipe, names: tuple[str, ...] = STAGES) -> None:
    """What training does as far as folders go: every stage that is not complete gets a checkpoint at its last step."""
    plan = reuse.examine(path, settings, "0")
    reuse.arrange(plan, path)
    for status in plan:
        if not status.complete and status.name in names:
            values = reuse.made_of(settings, status.name, "0")
            tensors = {"w": torch.tensor([float(reuse.identity(values)["digest"].encode()[0])])}
            save_checkpoint(path / status.name, Checkpoint(status.steps, {"ema": tensors}, reuse.identity(values)))


def states(path: Path, settings: Recipe) -> list[str]:
    return [status.state for status in reuse.examine(path, settings, "0")]


def checkpoints(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_settings_that_come_back_find_their_stages_complete(tmp_path: Path) -> None:
    a, b = recipe(), recipe("guide.tau=0.1", "target.gamma=0.2")
    assert states(tmp_path, a) == ["to train"] * 3
    train(tmp_path, a)
    first = checkpoints(tmp_path)
    assert states(tmp_path, a) == ["complete"] * 3
    assert states(tmp_path, b) == ["complete", "stale", "stale"]
    assert checkpoints(tmp_path) == first, "looking changes nothing"
    train(tmp_path, b)
    kept = {path.name for path in (tmp_path / "stale").iterdir()}
    assert kept == {f"{stage}-{digest(a, stage)[:8]}" for stage in ("target", "guide")}
    assert states(tmp_path, a) == ["complete", "comes back", "comes back"]
    train(tmp_path, a)
    assert {name: data for name, data in checkpoints(tmp_path).items() if not name.startswith("stale/")} == first
    assert states(tmp_path, b) == ["complete", "comes back", "comes back"]


def test_the_sentence_names_the_keys_both_values_and_the_place(tmp_path: Path) -> None:
    train(tmp_path, recipe())
    place = f"stale/guide-{digest(recipe(), 'guide')[:8]}"
    sentences = [status.sentence(tmp_path) for status in reuse.examine(tmp_path, recipe("guide.tau=0.1"), "0")]
    assert sentences == ["", "", f"guide: guide.tau = 0.07 -> 0.1; trains again (the old one is kept in {place})"]
    train(tmp_path, recipe("guide.tau=0.1"))
    place_b = f"stale/guide-{digest(recipe('guide.tau=0.1'), 'guide')[:8]}"
    [sentence] = [status.sentence(tmp_path) for status in reuse.examine(tmp_path, recipe(), "0")][2:]
    assert sentence == f"guide: guide.tau = 0.1 -> 0.07; comes back from {place} (the old one is kept in {place_b})"
    many = recipe(*(f"guide.{key}=3" for key in ("warmup_steps", "embedding_dim", "batch_size", "shift_px", "num_res_blocks")))
    assert "; and 2 more; trains again" in reuse.examine(tmp_path, many, "0")[2].sentence(tmp_path)


def test_more_steps_continue_a_stage_and_fewer_than_it_has_train_it_again(tmp_path: Path) -> None:
    train(tmp_path, recipe("guide.train_steps=100"))
    longer, shorter = recipe("guide.train_steps=200"), recipe("guide.train_steps=50")
    assert states(tmp_path, longer)[2] == "at step 100"
    sentence = reuse.examine(tmp_path, shorter, "0")[2].sentence(tmp_path)
    assert sentence.startswith("guide: guide.train_steps = 50, but it stands at step 100; trains again")
    train(tmp_path, shorter)
    train(tmp_path, longer)
    kept = [store.newest_state(path) for path in (tmp_path / "stale").iterdir()]
    assert [found[0] for found in kept if found] == [50], "the 100 that were kept came back and went on"
    train(tmp_path, shorter)
    assert store.newest_state(tmp_path / "guide") == (50, reuse.identity(reuse.made_of(shorter, "guide", "0")))


def test_what_is_kept_twice_gets_two_names(tmp_path: Path) -> None:
    long, short = recipe("guide.train_steps=100"), recipe("guide.train_steps=50")
    for settings in (long, short, recipe("guide.tau=0.1")):
        train(tmp_path, settings)
    name = f"guide-{digest(long, 'guide')[:8]}"
    assert {path.name for path in (tmp_path / "stale").iterdir()} == {name, f"{name}-2"}
    train(tmp_path, long)
    assert store.newest_state(tmp_path / "guide") == (100, reuse.identity(reuse.made_of(long, "guide", "0")))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("move", range(4))
def test_killed_before_or_after_any_move_the_same_command_ends_alike(
    move: int, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = recipe(), recipe("guide.tau=0.1", "target.gamma=0.2")
    for path in (tmp_path / "killed", tmp_path / "whole"):
        train(path, a)
        train(path, b)
    real, moves = store.move_folder, []

    def killed(source: Path, destination: Path) -> None:
        moves.append(source)
        if len(moves) == move + 1 and not after:
            raise Killed
        real(source, destination)
        if len(moves) == move + 1:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(store, "move_folder", killed)
        with pytest.raises(Killed):
            train(tmp_path / "killed", a)
    for settings in (a, b):
        train(tmp_path / "killed", settings)
        train(tmp_path / "whole", settings)
        assert checkpoints(tmp_path / "killed") == checkpoints(tmp_path / "whole")


def test_a_folder_without_a_checkpoint_makes_room_for_one_that_comes_back(tmp_path: Path) -> None:
    train(tmp_path, recipe())
    store.move_folder(tmp_path / "guide", tmp_path / "stale" / "whatever")
    (tmp_path / "stale" / "whatever").rename(tmp_path / "stale" / "guide-of-mine")  # what it is, its checkpoint says
    store.append_json(tmp_path / "guide" / "metrics.jsonl", {"step": 1})
    assert states(tmp_path, recipe())[2] == "comes back"
    train(tmp_path, recipe())
    assert states(tmp_path, recipe())[2] == "complete"
    assert (tmp_path / "stale" / "guide-unsaved" / "metrics.jsonl").exists()


def test_an_older_checkpoint_that_does_not_say_what_it_was_made_of_is_taken_as_it_is(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "guide", Checkpoint(recipe().guide.train_steps, {"ema": {"w": torch.zeros(1)}}, {"stage": "guide"}))
    assert states(tmp_path, recipe("guide.tau=0.1"))[2] == "complete"  # `store.create_run` has held it to the stored recipe
    assert reuse.changes({"stage": "guide"}, 4, recipe(), "guide", "0") == ""


def test_a_key_that_the_schema_did_not_have_then_stood_at_its_default(tmp_path: Path) -> None:
    train(tmp_path, recipe())
    state = tmp_path / "guide" / "step-000020000" / "state.json"
    table: dict[str, Any] = json.loads(state.read_text())
    del table["made_of"]["guide.init_from"]
    state.write_text(json.dumps({**table, "digest": "of then"}))
    assert states(tmp_path, recipe())[2] == "complete"
    assert states(tmp_path, recipe("guide.tau=0.1"))[2] == "stale"
    assert states(tmp_path, recipe(*FROM_TARGET))[2] == "stale"


def test_a_pretrained_file_that_is_gone_is_what_it_was_for_the_source_that_started_from_it(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"weights")
    settings = recipe(f"source.pretrained={file}")
    known = reuse.pretrained_sha256(tmp_path, settings)
    assert len(known) == 64
    assert reuse.pretrained_sha256(tmp_path, recipe()) == ""
    values = reuse.made_of(settings, "source", "0", known)
    save_checkpoint(tmp_path / "source", Checkpoint(4, {"ema": {"w": torch.zeros(1)}}, reuse.identity(values)))
    file.unlink()
    assert reuse.pretrained_sha256(tmp_path, settings) == known
    (tmp_path / "aside" / "stale").mkdir(parents=True)
    shutil.copytree(tmp_path / "source", tmp_path / "aside" / "stale" / "source-1")
    assert reuse.pretrained_sha256(tmp_path / "aside", settings) == known
    assert reuse.changes(reuse.identity(values), 4, settings, "source", "0") == ""
    assert "source.pretrained" in reuse.changes(reuse.identity(values), 4, recipe(), "source", "0")
    with pytest.raises(DataError, match=r"weights\.safetensors"):
        reuse.pretrained_sha256(tmp_path / "other", settings)
