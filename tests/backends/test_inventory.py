"""Changing any single field that an engine depends on never loads a stale one; what a run has exported is listed as it is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from engines import store
from engines.backends import choice, inventory
from engines.backends.base import EngineCard, card_path, read_card, read_engine
from engines.backends.choice import BUILDS
from engines.backends.export import export_digest, onnx_path
from engines.backends.fused import FusedCard
from engines.backends.gradient import GradientCard
from engines.backends.keys import AtLeast, check_card, differences, told, wanted
from engines.backends.trt_engine import Batches
from engines.backends.trt_engine import Build as PlanBuild
from engines.errors import DiffRCError, EngineError
from engines.recipe import Recipe, load

OTHER: dict[str, Any] = {
    "format": 2,
    "kind": "openvino",
    "precision": "bf16",
    "recipe_sha256": "0" * 64,
    "weights_sha256": "0" * 64,
    "file_sha256": "0" * 64,
    "image_size_px": 16,
    "image_channels": 3,
    "out_channels": 7,
    "timesteps": 999,
    "max_batch": 1,
    "opset": 19,
    "versions": {"onnxruntime": "1.0"},
    "device": "NVIDIA H200",
}
MEASURED = {  # what the gate found, and how: no part of what an engine depends on
    "classes",  # the labels of a run are held to the card's by `Maker.check_classes`
    "tolerance",
    "one_step_error",
    "trajectory_psnr_db",
    "trajectory_median_psnr_db",
    "trajectory_images",
    "label_agreement",
    "labels_by",
    "self_test",
    "measured_batch",
    "ms_per_image",
    "torch_ms_per_image",
}


@pytest.fixture
def run(exported_run: Path, tmp_path: Path) -> store.RunFolder:
    """A run of its own, exported for ONNX Runtime."""
    path = tmp_path / "runs" / "digits-lt"
    shutil.copytree(exported_run, path)
    return store.open_run(path)


def synth_loads(run: store.RunFolder, weights: str) -> None:
    """What `synth` does to load the run's engine for a network of these weights."""
    path = onnx_path(run, "target")

    def check(file: Any) -> None:
        check_card(file.card, run.recipe, weights, path, "diffrc export")

    chosen = choice.choose(path, BUILDS[:1], check)
    choice.load(chosen.file, "the engine", threads=1, batch=run.recipe.synth.batch_size)


def test_every_field_of_a_card_is_part_of_its_key_or_of_the_measurement() -> None:
    assert set(EngineCard.model_fields) == set(OTHER) | MEASURED


@pytest.mark.parametrize("field", OTHER)
def test_an_engine_whose_card_differs_in_one_field_is_not_loaded(field: str, run: store.RunFolder) -> None:
    path = onnx_path(run, "target")
    card = read_card(path)
    value = OTHER[field] if field != "versions" else card.versions | OTHER[field]
    store.write_json(card_path(path), card.model_dump(mode="json") | {field: value})
    with pytest.raises(DiffRCError) as failure:
        synth_loads(run, card.weights_sha256)
    assert failure.value.exit_code in (3, 4)
    (entry,) = inventory.list_engines(run)
    if field != "opset":  # which is the file's: it is refused when it is opened
        assert entry.state in ("stale", "damaged")
        assert entry.reason


def test_the_field_that_differs_is_named_with_both_values(run: store.RunFolder) -> None:
    card = read_engine(onnx_path(run, "target")).card
    newer = card.versions | {"onnxruntime": "1.0"}
    with pytest.raises(EngineError, match=r"onnxruntime 1\.0 then, \S+ now") as failure:
        check_card(card.model_copy(update={"versions": newer}), run.recipe, card.weights_sha256, Path("x.onnx"), "diffrc export")
    assert failure.value.remedy == "diffrc export holds it to torch again"


def test_a_batch_and_an_opset_that_were_typed_at_the_export_are_no_other_recipe(run: store.RunFolder) -> None:
    recipe = run.recipe
    typed = recipe.model_copy(update={"export": recipe.export.model_copy(update={"opset": 18, "max_batch": 128})})
    card = read_card(onnx_path(run, "target")).model_copy(update={"opset": 18, "max_batch": 128, "recipe_sha256": export_digest(typed)})
    assert differences(card, wanted(recipe, card, "onnx", weights_sha256=card.weights_sha256)) == ()
    looser = recipe.model_copy(update={"export": recipe.export.model_copy(update={"one_step_tolerance": 1.0})})
    (found,) = differences(card, wanted(looser, card, "onnx", weights_sha256=card.weights_sha256))
    assert found.field == "recipe_sha256", "an engine is held to the limits of now"


GRAPH = {
    "runtime": "openvino",
    "precision": "fp32",
    "recipe_sha256": "of the recipe",
    "weights_sha256": "of the network",
    "file_sha256": "of the file",
    "image_size_px": 8,
    "image_channels": 1,
    "classes": 10,
    "timesteps": 1000,
    "max_batch": 64,
    "opset": 20,
    "versions": {"torch": "2.13.0", "openvino": "2026.4.1"},
    "self_test": (),
}


class Card(BaseModel):
    """Any card."""

    runtime: str
    precision: str
    recipe_sha256: str
    weights_sha256: str
    guide_sha256: str
    rules: dict[str, Any]
    timesteps: int
    max_batch: int
    versions: dict[str, str]


KEY: dict[str, tuple[Any, Any]] = {
    "runtime": ("onnx", "openvino"),
    "precision": ("fp32", "bf16"),
    "recipe_sha256": ("a" * 64, "b" * 64),
    "weights_sha256": ("a" * 64, "b" * 64),
    "guide_sha256": ("a" * 64, "b" * 64),
    "rules": ({"sampler": "ddpm"}, {"sampler": "ddim"}),
    "timesteps": (1000, 500),
    "max_batch": (64, 32),
    "versions": ({"torch": "2.13.0"}, {"torch": "2.14.0"}),
}


@pytest.mark.parametrize("field", KEY)
def test_every_field_that_is_wanted_counts_alone(field: str) -> None:
    asked = {name: now for name, (now, _) in KEY.items()}
    assert differences(Card(**asked), asked) == ()
    (found,) = differences(Card(**asked | {field: KEY[field][1]}), asked)
    assert found.field == (field if field != "versions" else "torch")


def test_of_a_largest_batch_more_is_enough_and_of_versions_what_is_not_asked_for_does_not_count() -> None:
    card = Card(**{name: now for name, (now, _) in KEY.items()})
    assert differences(card, {"max_batch": AtLeast(64), "versions": {"torch": "2.13.0", "onnxscript": ""}}) == ()
    found = differences(card, {"max_batch": AtLeast(65), "versions": {"torch": "", "onnx": "1.23"}})
    assert told(found) == "largest batch 64 then, at least 65 now; torch 2.13.0 then, none now; onnx none then, 1.23 now"


def test_of_a_table_a_message_tells_what_differs_in_it() -> None:
    card = Card(**{name: now for name, (now, _) in KEY.items()} | {"rules": {"sampler": "ddpm", "clip": True}})
    assert told(differences(card, {"rules": {"sampler": "ddim", "clip": True}})) == "rules sampler = ddpm then, sampler = ddim now"


@pytest.mark.parametrize("field", PlanBuild.model_fields)
def test_every_field_of_what_a_plan_was_built_for_counts_alone(field: str) -> None:
    build = PlanBuild(
        onnx_sha256="a" * 64,
        tensorrt="11.3",
        gpu="H200",
        compute_capability="9.0",
        driver="580",
        precision="fp16",
        batches=Batches(1, 4, 8),
    )
    other = Batches(1, 5, 8) if field == "batches" else ("none",) if field == "flags" else "other"
    (found,) = differences(build, build.model_copy(update={field: other}).model_dump())
    assert found.field == field


@pytest.mark.parametrize("kind", [GradientCard, FusedCard])
def test_a_card_of_the_guidance_depends_on_all_that_its_graph_holds(kind: type[BaseModel], run: store.RunFolder) -> None:
    """Its weights, the guide's, the rules, the recipe, the versions, the shape: each is asked for by the listing."""
    recipe: Recipe = load("name = 'x'")
    fields: dict[str, Any] = {name: GRAPH.get(name) for name in kind.model_fields}
    card = kind.model_construct(**fields)
    asked = inventory._asked(store.RunFolder(run.path, recipe), "target", card, "openvino", lambda stage: f"of the {stage}")
    needed = {"weights_sha256", "recipe_sha256", "image_size_px", "image_channels", "timesteps", "max_batch", "versions"}
    assert needed | ({"guide_sha256", "rules"} if kind is FusedCard else set()) == set(asked)
    assert asked["weights_sha256"] == ("of the guide" if kind is GradientCard else "of the target")


def test_the_listing_tells_what_is_ready_stale_and_damaged(run: store.RunFolder) -> None:
    (entry,) = inventory.list_engines(run)
    assert (entry.name, entry.what, entry.state, entry.reason) == ("target onnx fp32", "network", "ready", "")
    assert entry.size_bytes == onnx_path(run, "target").stat().st_size
    assert entry.measured["label_agreement"] == 1.0
    card = card_path(onnx_path(run, "target"))
    told = card.read_text(encoding="utf-8")
    store.write_text(card, told.replace('"onnxruntime": "', '"onnxruntime": "0.'))
    (entry,) = inventory.list_engines(run)
    assert entry.state == "stale"
    assert "onnxruntime 0." in entry.reason
    store.write_text(card, told)
    store.write_bytes(onnx_path(run, "target"), b"another")
    assert [entry.state for entry in inventory.list_engines(run)] == ["damaged"]
    store.write_text(card, "{}")
    assert [entry.reason for entry in inventory.list_engines(run)] == ["its card is not one of this version"]
    card.unlink()
    (entry,) = inventory.list_engines(run)
    assert (entry.name, entry.state, entry.card_path) == ("target.onnx", "damaged", None)


def test_a_build_that_cannot_run_here_says_why(run: store.RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise EngineError("ONNX Runtime cannot be imported", "pip")

    monkeypatch.setattr(choice, "require", missing)
    (entry,) = inventory.list_engines(run)
    assert (entry.state, entry.reason) == ("cannot run here", "ONNX Runtime cannot be imported")


def test_a_file_stays_while_another_card_names_it_and_nothing_outside_is_touched(run: store.RunFolder, tmp_path: Path) -> None:
    path = onnx_path(run, "target")
    second = card_path(path, "openvino", "bf16")
    fields = read_card(path).model_dump(mode="json") | {"kind": "openvino", "precision": "bf16"}
    store.write_json(second, fields)
    outside = tmp_path / "outside.onnx"
    outside.write_bytes(b"theirs")
    path.with_name("linked.onnx").symlink_to(outside)
    path.with_name("linked.json").symlink_to(outside)
    entries = {entry.name: entry for entry in inventory.list_engines(run)}
    assert set(entries) == {"target onnx fp32", "target openvino bf16"}
    size = card_path(path).stat().st_size
    assert inventory.remove(run, [entries["target onnx fp32"]]) == size
    assert path.is_file()
    assert second.is_file()
    assert inventory.remove(run, inventory.list_engines(run)) > size
    assert not path.exists()
    assert outside.read_bytes() == b"theirs"


def test_the_explanation_names_what_is_taken_and_why_not_each_of_the_others(run: store.RunFolder) -> None:
    verdict, others = inventory.explain(run, "target")
    assert verdict.startswith("onnx fp32: no other is exported")
    assert {str(fate.build): fate.why for fate in others} == {str(build): "not exported" for build in BUILDS[1:]}
    verdict, others = inventory.explain(store.open_run(run.path, ("synth.engine=openvino",)), "target")
    assert verdict.startswith("none: ")
    assert {fate.build.kind: fate.why for fate in others}["onnx"] == "not asked for: synth.engine is openvino, in auto"
    assert inventory.explain(store.open_run(run.path, ("synth.engine=torch",)), "target")[0].startswith("torch")
