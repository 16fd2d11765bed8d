"""What a run has got is told from its names, sizes and JSON; what comes next is the first thing that is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engines import store
from engines.backends import keys
from engines.errors import DataError, UsageError
from engines.health.status import look
from engines.store import RunFolder
from engines.training import reuse

ROOT = Path(__file__).parent.parent.parent


def command(path: Path) -> str:
    """What comes next, without `diffrc` and the run."""
    told = look(path).next_command
    assert not told or (told.startswith("diffrc ") and told.endswith(f" --run {path}"))
    return told.removeprefix("diffrc ").removesuffix(f" --run {path}")


@pytest.fixture
def exported_copy(tiny_copy: Path) -> Path:
    """The trained tiny run with the card of an engine that fits, beside a file that no runtime would take: it is not read."""
    recipe = store.open_run(tiny_copy).recipe
    data, export = recipe.data, recipe.export
    card = {
        "kind": "onnx",
        "precision": "fp32",
        "recipe_sha256": keys.export_digest(recipe),
        "weights_sha256": "of the target",
        "file_sha256": "not asked",
        "image_size_px": data.image_size_px,
        "image_channels": data.image_channels,
        "out_channels": data.image_channels * (2 if recipe.unet.learn_sigma else 1),
        "timesteps": recipe.diffusion.steps,
        "max_batch": export.max_batch,
        "opset": export.opset,
        "versions": {name: version for name, version in keys.versions_now((*keys.EXPORTERS, *keys.RUNTIMES["onnx"])).items() if version},
    }
    store.write_json(tiny_copy / "engines/onnx/target.json", card)
    store.write_text(tiny_copy / "engines/onnx/target.onnx", "no ONNX")
    return tiny_copy


def test_the_next_command_is_the_first_that_is_missing(exported_copy: Path, fill_with_noise: Callable[[RunFolder], None]) -> None:
    path, run = exported_copy, store.open_run(exported_copy)
    assert command(path) == "synth --fill"
    fill_with_noise(run)
    found = look(path)
    [images] = found.images
    assert (images.there, images.ended, images.stale) == (images.asked, False, ())
    assert command(path) == "synth --fill", "no yield.json: the job was killed before its end"
    store.write_json(path / "synth/yield.json", [{"class": row.name, "asked": row.asked} for row in images.classes])
    assert command(path) == "evaluate"
    store.write_json(path / "evaluation/accuracy.json", {"verdict": "it helps"})
    store.write_json(path / "evaluation/trust.json", {"images": images.there - 1})
    assert command(path) == "evaluate", "it was of other images"
    store.write_json(path / "evaluation/trust.json", {"images": images.there})
    assert command(path) == "report"
    store.write_text(path / "report/index.html", "<p>")
    found = look(path)
    assert (found.next_command, found.report, found.evaluated, found.evaluated_images) == ("", True, True, True)
    shutil.rmtree(path / "engines")
    assert command(path) == "export"
    shutil.rmtree(path / "guide")
    assert command(path) == "train"
    assert look(path).why == "the guide is not trained"


def test_stages_say_how_far_they_are_and_what_made_them_stale(tiny_copy: Path) -> None:
    found = look(tiny_copy)
    assert [(stage.name, stage.step, stage.steps, stage.state) for stage in found.stages] == [
        (name, 4, 4, "complete") for name in ("source", "target", "guide")
    ]
    assert (found.classes, found.train_images) == (10, sum(store.open_run(tiny_copy).classes()["counts"]))
    text = (tiny_copy / "recipe.toml").read_text(encoding="utf-8")
    store.write_text(tiny_copy / "recipe.toml", text.replace("tau = 0.07", "tau = 0.5"))
    found = look(tiny_copy)
    assert [stage.state for stage in found.stages] == ["complete", "complete", "stale"]
    assert found.stages[2].changes == ("guide.tau = 0.07 -> 0.5",)
    assert found.next_command == f"diffrc train --run {tiny_copy}"


def test_a_run_that_has_only_its_recipe_begins_with_training(made_copy: Path) -> None:
    (made_copy / "classes.json").unlink()
    found = look(made_copy)
    assert (found.classes, found.next_command) == (0, f"diffrc train --run {made_copy}")
    assert {stage.state for stage in found.stages} == {"to train"}


def test_images_are_counted_by_class_and_the_dropped_ones_do_not_count(made_copy: Path) -> None:
    [images] = look(made_copy).images
    assert all(row.synthetic == row.asked > 0 for row in images.classes), "the fixture makes one more, and drops it"
    row = images.classes[0]
    folder = next(path for path in (made_copy / "synth").iterdir() if path.name.startswith(row.name))
    (folder / "000000.png").unlink()
    store.write_text(folder / "notes.png", "")
    [images] = look(made_copy).images
    assert images.classes[0].synthetic == row.synthetic - 1


def test_images_of_other_weights_than_the_runs_are_stale(exported_copy: Path, fill_with_noise: Callable[[RunFolder], None]) -> None:
    fill_with_noise(store.open_run(exported_copy))
    plan = store.read_json(exported_copy / "synth/plan.json")
    marks = {stage: reuse.mark(exported_copy, stage) for stage in ("target", "guide")}
    store.write_json(exported_copy / "synth/plan.json", plan | {"stages": marks})
    assert look(exported_copy).images[0].stale == ()
    store.write_json(exported_copy / "synth/plan.json", plan | {"stages": marks | {"guide": "00000000@4"}})
    found = look(exported_copy)
    assert found.images[0].stale == ("guide",)
    assert found.next_command == f"diffrc run --run {exported_copy}"


def test_an_engine_says_why_it_does_not_fit(exported_copy: Path, fill_with_noise: Callable[[RunFolder], None]) -> None:
    [engine] = look(exported_copy).engines
    assert (engine.fits, engine.network, engine.kind, engine.whole) == (True, "target", "onnx", True)
    card = exported_copy / "engines/onnx/target.json"
    good = store.read_json(card)
    fill_with_noise(store.open_run(exported_copy))
    plan = store.read_json(exported_copy / "synth/plan.json")
    for theirs, mark, says in (
        (good["weights_sha256"], reuse.mark(exported_copy, "target"), ""),
        ("other", reuse.mark(exported_copy, "target"), "exported from other weights"),
        (good["weights_sha256"], "00000000@9", "exported from other weights"),
        ("other", "00000000@9", ""),
    ):
        identity = plan["identity"] | {"weights_sha256": theirs}
        store.write_json(exported_copy / "synth/plan.json", plan | {"identity": identity, "stages": {"target": mark}})
        assert says in look(exported_copy).engines[0].reason
        assert look(exported_copy).engines[0].fits == (not says)
    for change, says in (
        ({"versions": good["versions"] | {"onnxruntime": "0.1"}}, "onnxruntime 0.1 then"),
        ({"recipe_sha256": "0" * 64}, "recipe 000000000000 then"),
        ({"max_batch": 1}, "largest batch 1 then"),
        ({"kind": "abacus"}, "no runtime is named 'abacus'"),
    ):
        store.write_json(card, good | change)
        found = look(exported_copy)
        assert says in found.engines[0].reason
        assert found.next_command == f"diffrc export --run {exported_copy}"
    store.write_json(card, {"format": 1})
    assert look(exported_copy).engines[0].reason == "its card is not one of this version"
    store.write_json(card, good)
    (exported_copy / "engines/onnx/target.onnx").unlink()
    assert look(exported_copy).engines[0].reason == "target.onnx is gone"


def test_who_is_at_work_and_what_is_on_the_disk(made_copy: Path) -> None:
    assert look(made_copy).locks == ()
    with store.locked(made_copy / "synth"):
        [lock] = look(made_copy).locks
        assert (lock.folder, lock.holder.pid) == ("synth", os.getpid())
        assert lock.told.startswith(f"process {os.getpid()} (")
    store.write_bytes(made_copy / "stale/old/file", b"x" * 100_000)
    disk = look(made_copy).disk_bytes
    assert disk["stale"] == 100_000
    assert sum(disk.values()) == sum(path.stat().st_size for path in made_copy.rglob("*") if path.is_file())


def test_no_weights_and_no_image_are_read_and_torch_is_not_imported(
    exported_copy: Path, fill_with_noise: Callable[[RunFolder], None]
) -> None:
    fill_with_noise(store.open_run(exported_copy))
    for path in exported_copy.rglob("*"):
        if path.suffix in (".safetensors", ".png"):
            path.write_bytes(b"")
    before = sorted(exported_copy.rglob("*"))
    script = "import sys, pathlib; from engines.health.status import look; look(pathlib.Path(sys.argv[1])); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, str(exported_copy)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("False\n", "")
    assert sorted(exported_copy.rglob("*")) == before, "nothing is written"


def test_damage_is_told_as_damage(made_copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a run folder"):
        look(tmp_path)
    for name, text in (("synth/plan.json", "[]"), ("cost.jsonl", "{\n"), ("classes.json", "")):
        (made_copy / name).write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=name.partition("/")[2] or name):
            look(made_copy)
        (made_copy / name).unlink()
