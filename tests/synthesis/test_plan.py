"""A plan fixes pixels and nothing else; a request says how many."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines import store
from engines.errors import ConflictError, DataError, UsageError
from engines.recipe import Recipe, SynthSection, TargetSection
from engines.store import RunFolder
from engines.synthesis import plan as plans
from engines.training import reuse


def run_of(path: Path, **sections: Any) -> RunFolder:
    recipe = Recipe(name="test", **sections)
    run = RunFolder(path, recipe)
    names, counts = ["cat", "black swan", "ringlet", "cheetah"], [200, 50, 8, 5]
    groups = ["many", "medium", "few", "few"]
    store.write_json(path / "classes.json", {"names": names, "counts": counts, "groups": groups, "kept_sha256": ""})
    return run


@pytest.mark.parametrize(
    "override",
    [
        "synth.steps=4",
        "synth.seed=1",
        "synth.sampler=ddim",
        "synth.guidance_scale=0.3",
        "synth.batch_size=6",
        "synth.clip_denoised=false",
        "synth.guidance_interval=[0, 500]",
        "synth.classifier_free_scale=0.5",
        "select.distance_band=2.0",
        "select.confidence=0.5",
        "diffusion.noise_schedule=cosine",
    ],
)
def test_whatever_changes_pixels_changes_the_plan(override: str, make_maker: Any) -> None:
    assert make_maker(override).plan.id != make_maker().plan.id


@pytest.mark.parametrize(
    "override",
    ["synth.fill_to=9", "synth.max_bad=1", "synth.engine=torch", "select.max_tries=9.0", "select.copy_ratio=0.0", "export.opset=21"],
)
def test_what_does_not_change_pixels_does_not_change_the_plan(override: str, make_maker: Any) -> None:
    assert make_maker(override).plan.id == make_maker().plan.id


def test_other_weights_another_guide_and_another_engine_are_another_plan(make_maker: Any) -> None:
    maker = make_maker()
    table = {"names": ["zero", "one", "two"], "kept_sha256": "of the data"}
    card = maker.engine.card

    def plan_of(card: Any, guide: str = "of the guide", table: Any = table, model: Any = "target") -> str:
        return plans.make_plan(maker.recipe, table, model, card, guide, {}).id

    assert plan_of(card) == maker.plan.id, "versions are told, not compared"
    others = {
        plan_of(card.model_copy(update={"weights_sha256": "x"})),
        plan_of(card.model_copy(update={"file_sha256": "x"})),
        plan_of(card.model_copy(update={"kind": "onnx"})),
        plan_of(card, guide="x"),
        plan_of(card, table=table | {"names": ["zero", "two", "one"]}),
        plan_of(card, model="source"),
        maker.plan.id,
    }
    assert len(others) == 7


def test_a_step_in_one_graph_is_another_plan_and_without_one_it_is_the_plan_of_before(tmp_path: Path, make_maker: Any) -> None:
    maker = make_maker("synth.fused=false")
    table = {"names": ["zero", "one", "two"], "kept_sha256": "of the data"}

    def plan_of(guided_sha256: str) -> plans.Plan:
        return plans.make_plan(maker.recipe, table, "target", maker.engine.card, "of the guide", {}, guided_sha256)

    assert plan_of("").id == make_maker().plan.id
    assert not any("guided" in key or "fused" in key for key in plan_of("").identity)
    assert len({plan_of(sha256).id for sha256 in ("", "one", "other")}) == 3
    assert plans.made_with(tmp_path) == plans.MadeWith("", None)
    for sha256 in ("", "one"):
        plans.keep_plan(tmp_path / f"of{sha256}", plan_of(sha256))
        found = plans.made_with(tmp_path / f"of{sha256}")
        assert (found.build, found.guided_sha256) == ("torch fp32", sha256)
    (tmp_path / "ofone" / "manifest.jsonl").write_text("{}\n")  # an image was made
    with pytest.raises(ConflictError, match=r"guided_step\.file_sha256 = one there, other now"):
        plans.keep_plan(tmp_path / "ofone", plan_of("other"))


def test_a_folder_keeps_its_plan_and_refuses_another_naming_what_differs(tmp_path: Path, make_maker: Any) -> None:
    plans.keep_plan(tmp_path, make_maker().plan)
    before = (tmp_path / "plan.json").read_bytes()
    plans.keep_plan(tmp_path, make_maker().plan)
    (tmp_path / "manifest.jsonl").write_text("{}\n")  # an image was made
    with pytest.raises(ConflictError, match=r"synth\.steps = 3 there, 9 now; synth\.seed = 0 there, 7 now") as failure:
        plans.keep_plan(tmp_path, make_maker("synth.steps=9", "synth.seed=7").plan)
    assert failure.value.exit_code == 5
    assert "--out" in failure.value.remedy
    assert (tmp_path / "plan.json").read_bytes() == before


def test_a_damaged_plan_is_a_data_error(tmp_path: Path, make_maker: Any) -> None:
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(DataError):
        plans.keep_plan(tmp_path, make_maker().plan)


def test_a_plan_can_be_read_by_people(tmp_path: Path, make_maker: Any) -> None:
    plans.keep_plan(tmp_path, make_maker().plan)
    table = json.loads((tmp_path / "plan.json").read_text())
    assert table["plan"] == make_maker().plan.id
    assert table["identity"]["classes"] == ["zero", "one", "two"]
    assert table["identity"]["synth.steps"] == 3


def test_only_a_free_or_an_own_folder_is_taken(tmp_path: Path, make_maker: Any) -> None:
    plans.check_folder(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".lock").touch()
    (tmp_path / "empty" / ".plan.json.123.0a1b2c3d.tmp").touch()  # what a kill before the plan leaves
    plans.check_folder(tmp_path / "empty")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("photos", "photos/cat.jpg", "link"):
        with pytest.raises(ConflictError):
            plans.check_folder(tmp_path / name)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


@pytest.mark.parametrize("n", [0, -3])
def test_no_image_is_nothing_to_ask_for(n: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        plans.asked_classes(run_of(tmp_path), ["ringlet"], n)


def test_classes_are_asked_as_people_type_them(tmp_path: Path) -> None:
    assert plans.asked_classes(run_of(tmp_path), ["Black-Swan", "cheetah"], 7) == {1: 7, 3: 7}
    with pytest.raises(UsageError, match="no class named"):
        plans.asked_classes(run_of(tmp_path), ["blackswna"], 7)


def test_filling_brings_every_medium_and_few_class_to_the_largest_or_to_n_fill(tmp_path: Path) -> None:
    assert plans.fill_classes(run_of(tmp_path)) == {1: 150, 2: 192, 3: 195}
    assert plans.fill_classes(run_of(tmp_path, synth=SynthSection(fill_to=20))) == {2: 12, 3: 15}
    with pytest.raises(UsageError):
        plans.fill_classes(run_of(tmp_path, synth=SynthSection(fill_to=5)))


def test_a_head_class_is_drawn_by_the_source_model_or_refused_with_the_reason(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    assert plans.by_model(run, {0: 5, 2: 5}, source_ready=True) == {"source": {0: 5}, "target": {2: 5}}
    with pytest.raises(UsageError, match="forgotten") as failure:
        plans.by_model(run, {0: 5}, source_ready=False)
    assert "--model source" in failure.value.remedy
    assert plans.by_model(run_of(tmp_path, synth=SynthSection(model="source")), {0: 5, 2: 5}, False) == {"source": {0: 5, 2: 5}}
    assert plans.by_model(run_of(tmp_path, target=TargetSection(adapt_on="all")), {0: 5, 2: 5}, False) == {"target": {0: 5, 2: 5}}


def test_two_models_never_share_a_folder(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    assert plans.folder_of(run, "target", None) == tmp_path / "synth"
    assert plans.folder_of(run, "source", None) == tmp_path / "synth-source"
    assert plans.folder_of(run, "source", tmp_path / "here") == tmp_path / "here-source"


def test_images_of_other_settings_are_kept_aside_and_come_back_with_them(tmp_path: Path, make_maker: Any) -> None:
    run, a, b = run_of(tmp_path / "run"), make_maker().plan, make_maker("synth.seed=1").plan

    def work(plan: plans.Plan) -> set[str]:
        plans.make_room(run, run.synth, plan)
        with store.locked(run.synth):
            plans.keep_plan(run.synth, plan)
            store.write_text(run.synth / plan.id, "an image")
        return {path.name for path in run.synth.iterdir()}

    first = work(a)
    assert work(a) == first
    assert b.id in work(b)
    assert {path.name for path in run.stale.iterdir()} == {f"synth-{a.id[:8]}"}
    assert work(a) == first
    assert {path.name for path in run.stale.iterdir()} == {f"synth-{b.id[:8]}"}
    store.move_folder(run.synth, run.stale / "synth-of-mine")  # killed between the two moves, under any name
    assert work(a) == first
    with store.locked(run.synth), pytest.raises(ConflictError, match="in use"):
        plans.make_room(run, run.synth, b)
    store.write_text(tmp_path / "run" / "thesis" / "thesis.tex", "mine")
    with pytest.raises(ConflictError, match="holds no synthesized images"):
        plans.make_room(run, tmp_path / "run" / "thesis", a)


def test_images_of_a_stage_that_was_trained_again_are_not_evaluated_as_if_they_were_its_own(tmp_path: Path, make_maker: Any) -> None:
    run, plan = run_of(tmp_path / "run"), make_maker().plan

    def train(digest: str, step: int) -> None:
        store.save_checkpoint(run.stage("guide"), store.Checkpoint(step, {}, {"digest": digest}))

    train("1" * 64, 4)
    plans.keep_plan(run.synth, replace(plan, stages={"guide": reuse.mark(run.path, "guide"), "target": reuse.mark(run.path, "target")}))
    assert store.read_json(run.synth / "plan.json")["stages"] == {"guide": "11111111@4", "target": ""}
    plans.require_current(run)
    train("1" * 64, 6)
    with pytest.raises(ConflictError, match="were made by another guide than") as refused:
        plans.require_current(run)
    assert refused.value.remedy.startswith(f"diffrc run --run {run.path}")
    plans.keep_plan(run.synth, replace(plan, stages={"guide": "11111111@6"}))  # of equal weights after all
    plans.require_current(run)
    store.write_json(run.synth / "plan.json", {"plan": "of an older version", "identity": {"classes": []}})
    plans.require_current(run)
