"""Nothing that is wrong with a folder of synthesized images stays unseen: what files can tell, and what only remaking them can."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engines import store
from engines.errors import ConflictError, DataError, Interrupted, UsageError
from engines.store import RunFolder
from engines.synthesis import verify as verification
from engines.synthesis.examine import Disagreement, Files
from engines.synthesis.maker import Maker
from engines.synthesis.plan import host
from engines.synthesis.remake import compare, maker_of, recipe_of_plan
from engines.synthesis.sheet import decode_png, encode_png, pixels_sha256
from engines.synthesis.synthesize import make_folder, synthesize
from engines.synthesis.verify import verify

WANTED = {0: 3, 2: 6}
ONE = "two-0002/000003.png"


@pytest.fixture(scope="module")
def whole(torch_maker: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "synth"
    make_folder(folder, torch_maker, WANTED)
    return folder


@pytest.fixture
def made(whole: Path, tmp_path: Path) -> Path:
    """WANTED, which may be changed."""
    return Path(shutil.copytree(whole, tmp_path / "synth"))


def disagreements(folder: Path) -> dict[str, str]:
    """What the files of a folder alone tell, by file."""
    [found] = verify(folder, sample=0)
    return dict(found.disagreements)


# --------------------------------------------------------------------------------------------------------------- files


def test_a_folder_as_it_was_made_agrees_as_a_whole_and_in_each_part(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, images in ((whole, 9), (whole / "two-0002", 6), (whole / "zero-0000", 3)):
        [found] = verify(part, sample=0)
        assert (found.disagreements, found.images, found.folder) == ((), images, whole)
    monkeypatch.chdir(whole / "two-0002")
    [here] = verify(Path(), sample=0)
    assert (here.disagreements, here.images) == ((), 6)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swapped(path: Path) -> None:
    other = path.with_name("000004.png")
    a, b = path.read_bytes(), other.read_bytes()
    path.write_bytes(b)
    other.write_bytes(a)


def stripped(path: Path) -> None:
    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())


def rewritten(path: Path, **values: object) -> None:
    """The same pixels with another text, its hash right."""
    pixels, record = decode_png(path.read_bytes(), "two", "")
    path.write_bytes(encode_png(pixels, replace(record, **values)))  # type: ignore[arg-type]


def not_said_to_be_synthetic(path: Path) -> None:
    data = path.read_bytes()
    at = data.index(b"synthetic\0true") - 4
    chunk = data[at : at + 4] + b"synthetic\0fals"
    import zlib

    path.write_bytes(data[:at] + chunk + zlib.crc32(chunk).to_bytes(4) + data[at + len(chunk) + 4 :])


def edited_manifest(path: Path) -> None:
    manifest = path.parent.parent / "manifest.jsonl"
    _, record = decode_png(path.read_bytes(), "two", "")
    other = hashlib.sha256(b"").hexdigest()
    manifest.write_text(manifest.read_text().replace(record.pixels_sha256, other))


def without_its_line(path: Path) -> None:
    manifest = path.parent.parent / "manifest.jsonl"
    manifest.write_text("".join(line + "\n" for line in manifest.read_text().splitlines() if ONE not in line))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (flipped, "is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "cut off"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (swapped, "says that it is two-0002/000004.png"),
        (stripped, "its text lacks synthetic, plan, class_id"),
        (not_said_to_be_synthetic, "synthetic='fals'"),
        (lambda path: rewritten(path, plan="0" * 32), "of another plan (00000000)"),
        (lambda path: rewritten(path, class_id=1), "says that it is one-0001/000003.png"),
        (lambda path: rewritten(path, class_id=7), "of class 7, of 3"),
        (lambda path: rewritten(path, seed=1), "its seed is 1, not the plan's 0"),
        (lambda path: rewritten(path, versions="{}"), "does not name the versions"),
        (lambda path: rewritten(path, dropped="distance"), "says that it is two-0002/rejected/000003.png"),
        (edited_manifest, "its line in manifest.jsonl says otherwise: pixels_sha256"),
        (without_its_line, "has no line in manifest.jsonl"),
        (lambda path: path.unlink(), "has a line in manifest.jsonl, and no file"),
    ],
    ids=[
        *("a changed byte", "cut off", "empty", "swapped files", "stripped text", "not said to be synthetic", "of another plan"),
        *("another class", "a class that there is not", "another seed", "no versions", "said to be dropped", "an edited manifest"),
        *("no line", "no file"),
    ],
)
def test_what_is_wrong_with_an_image_is_found_and_named(harm: Callable[[Path], None], says: str, made: Path) -> None:
    harm(made / ONE)
    found = disagreements(made)
    assert says in found[ONE]
    assert set(found) <= {ONE, "two-0002/000004.png"}, "nothing else is accused"
    assert says in disagreements(made / "two-0002")[ONE]
    assert disagreements(made / "zero-0000") == {}


def test_a_changed_byte_is_found_wherever_it_is(made: Path) -> None:
    path = made / ONE
    data = path.read_bytes()
    for at in range(0, len(data), 17):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        assert ONE in disagreements(made / "two-0002"), at


@pytest.mark.parametrize("place", ["two-0002/extra.png", "three-0003/000000.png", "two-0002/deeper/rejected/000000.png", "000000.png"])
def test_an_image_in_a_place_that_is_no_images_is_found(place: str, made: Path) -> None:
    (made / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(made / ONE, made / place)
    assert disagreements(made) == {place: "is in no place where an image of this plan lies"}


def test_a_link_in_the_place_of_an_image_is_found(made: Path) -> None:
    (made / ONE).rename(made.parent / "moved.png")
    (made / ONE).symlink_to(made.parent / "moved.png")
    assert disagreements(made) == {ONE: "is a symbolic link"}


def test_a_line_that_cannot_be_read_or_is_there_twice_is_found_by_its_number(made: Path) -> None:
    manifest = made / "manifest.jsonl"
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join([*lines, lines[0], "{", "[]", '{"file": "two-0002/000099.png"}']) + "\n")
    [found] = verify(made, sample=0)
    assert set(found.disagreements) == {
        Disagreement("manifest.jsonl", "line 10 names zero-0000/000000.png again"),
        Disagreement("manifest.jsonl", "line 11 cannot be read"),
        Disagreement("manifest.jsonl", "line 12 cannot be read"),
        Disagreement("two-0002/000099.png", "has a line in manifest.jsonl, and no file"),
    }
    manifest.unlink()
    assert disagreements(made)["manifest.jsonl"] == "is not there"


def test_an_edited_plan_is_found_and_nothing_is_remade_by_it(made: Path) -> None:
    plan = store.read_json(made / "plan.json")
    plan["identity"]["synth.steps"] = 4
    store.write_json(made / "plan.json", plan)
    [found] = verify(made)
    assert found.disagreements == (Disagreement("plan.json", "its identity is not the one that its id was made of"),)
    assert (found.remade, found.sound) == (0, False)


def test_what_is_no_folder_of_images_is_refused(made: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "nowhere", tmp_path / "empty", made / ONE):
        with pytest.raises(UsageError):
            verify(folder)
    (made / "plan.json").write_text("{}")
    with pytest.raises(DataError, match="is no plan"):
        verify(made)


def test_a_folder_at_work_is_left_alone(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "holder", lambda folder: store.Holder(1, "diffrc synth"))
    with pytest.raises(ConflictError, match="in use"):
        verify(made)


def test_images_without_a_run_that_can_remake_them_say_so(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    [found] = verify(made)
    assert isinstance(found.failure, UsageError)
    assert (found.sound, found.disagreements) == (False, ())


# -------------------------------------------------------------------------------------------------------------- pixels


def test_close_means_999_values_of_a_thousand_within_one_of_255() -> None:
    image = np.full((10, 100, 1), 100, dtype=np.uint8)
    near = image + np.uint8(1)
    assert compare(image, near)[1]
    near[0, 0] = 103
    assert compare(image, near)[1]
    near[0, 1] = 97
    assert not compare(image, near)[1]
    assert not compare(image, image[:5])[1]
    told, close = compare(image, image + np.uint8(2), half_db=30.0)
    assert close and told.endswith("at most 2; 42 dB"), "10 log10(255^2 / 4) = 42.1"
    assert not compare(image, image + np.uint8(10), half_db=30.0)[1], "10 log10(255^2 / 100) = 28.1"


@pytest.fixture(scope="module")
def made_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run whose images torch made, with options that its recipe does not know."""
    path = tmp_path_factory.mktemp("run") / "runs" / "digits-lt"
    shutil.copytree(tiny_run, path)
    run = store.open_run(path, ("synth.engine=torch", "synth.steps=3", "synth.seed=5", "select.confidence=0.0001"))
    synthesize(run, {9: 5, 7: 3})
    return path


@pytest.fixture
def run(made_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_run, tmp_path / "runs" / "digits-lt"))


def test_every_image_is_remade_bit_for_bit_by_what_its_plan_says(made_run: Path) -> None:
    [found] = verify(made_run, sample=100)
    assert (found.asked, found.equal, found.close, found.expected, found.why_close) == (8, 8, 0, "equal", "")
    assert found.sound
    assert found.engine == "torch fp32"
    [part] = verify(made_run / "synth" / "nine-0009", sample=2, seed=3)
    assert (part.asked, part.equal, part.images) == (2, 2, 5)


def test_an_image_that_was_changed_with_its_hash_and_its_line_is_found_by_remaking_it(run: Path) -> None:
    path = run / "synth/nine-0009/000002.png"
    pixels, record = decode_png(path.read_bytes(), "nine", "")
    pixels = pixels.copy()
    pixels[0, 0, 0] ^= 1
    changed = replace(record, pixels_sha256=pixels_sha256(pixels))
    path.write_bytes(encode_png(pixels, changed))
    manifest = run / "synth/manifest.jsonl"
    manifest.write_text(manifest.read_text().replace(record.pixels_sha256, changed.pixels_sha256))
    assert disagreements(run / "synth") == {}, "no file tells"
    [found] = verify(run, sample=100)
    assert [name for name, _ in found.disagreements] == ["nine-0009/000002.png"]
    assert "at most 1" in found.disagreements[0].what
    assert (found.equal, found.close, found.sound) == (7, 0, False)


def test_on_another_kind_of_machine_a_last_bit_may_differ_and_no_more(run: Path) -> None:
    plan = store.read_json(run / "synth/plan.json")
    assert plan["hosts"] == [host()]
    store.write_json(run / "synth/plan.json", plan | {"hosts": ["another"]})
    path = run / "synth/nine-0009/000002.png"
    original, record = decode_png(path.read_bytes(), "nine", "")
    for step, agrees in ((1, True), (2, False)):
        pixels = original.copy()
        pixels[0, 0, 0] = original[0, 0, 0] + step if original[0, 0, 0] < 128 else original[0, 0, 0] - step
        changed = replace(record, pixels_sha256=pixels_sha256(pixels))
        path.write_bytes(encode_png(pixels, changed))
        manifest = run / "synth/manifest.jsonl"
        lines = [json.loads(line) for line in manifest.read_text().splitlines()]
        lines = [changed.line() if line["file"] == "nine-0009/000002.png" else line for line in lines]
        store.write_json_lines(manifest, lines)
        [found] = verify(run, sample=100)
        assert (found.sound, found.equal, found.close) == (agrees, 7, int(agrees))
        assert found.why_close == "made on another kind of machine"


def test_other_weights_are_found(run: Path) -> None:
    [step] = (run / "target").glob("step-000000004")
    weights = store.read_tensors(step / "ema.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 1e-3
    store.write_tensors(step / "ema.safetensors", weights)
    manifest = store.read_json(step / "MANIFEST.json")
    manifest["ema.safetensors"]["sha256"] = hashlib.sha256((step / "ema.safetensors").read_bytes()).hexdigest()
    store.write_json(step / "MANIFEST.json", manifest)
    [found] = verify(run)
    assert isinstance(found.failure, ConflictError)
    assert "weights_sha256" in found.failure.problem
    assert (found.remade, found.sound) == (0, False)


def test_weights_that_are_gone_are_said_to_be_gone(run: Path) -> None:
    shutil.rmtree(run / "target")
    [found] = verify(run)
    assert isinstance(found.failure, UsageError)
    assert "not trained" in found.failure.problem


def test_images_that_were_copied_elsewhere_are_known_by_their_plan(run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "picked"
    elsewhere.mkdir()
    for i, name in enumerate(("nine-0009/000001.png", "seven-0007/000002.png")):
        shutil.copy(run / "synth" / name, elsewhere / f"picture {i}.png")
    [found] = verify(elsewhere, run, sample=10)
    assert (found.images, found.equal, found.sound) == (2, 2, True)
    flipped(elsewhere / "picture 1.png")
    [found] = verify(elsewhere, run, sample=10)
    assert [name for name, _ in found.disagreements] == ["picture 1.png"]
    shutil.copy(elsewhere / "picture 0.png", elsewhere / "again.png")
    assert ("picture 0.png", "is the same image as another file") in verify(elsewhere, run, sample=0)[0].disagreements
    shutil.rmtree(run / "synth")
    with pytest.raises(DataError, match="does not hold"):
        verify(elsewhere, run)


def test_a_sample_is_another_for_another_seed_and_the_same_for_the_same(whole: Path) -> None:
    files = Files(verification.places(whole)[0], {}, store.read_json(whole / "plan.json")["plan"], ["zero", "one", "two"])
    files.examine(lambda *_: None, verification.StopRequest())
    assert files.sample(4, 1) == files.sample(4, 1)
    assert len({tuple(files.sample(4, seed)) for seed in range(20)}) > 10
    assert len(files.sample(9, 0)) == 9


def test_the_recipe_of_a_plan_is_the_runs_with_what_was_typed(made_run: Path) -> None:
    opened: RunFolder = store.open_run(made_run)
    identity = store.read_json(made_run / "synth/plan.json")["identity"]
    recipe = recipe_of_plan(opened.recipe, identity)
    synth = recipe.synth
    assert (synth.steps, synth.seed, synth.engine, synth.precision, synth.device) == (3, 5, "torch", "fp32", "cpu")
    assert recipe.select.confidence == 0.0001
    assert recipe.target == opened.recipe.target
    assert torch.get_num_threads() == 1


def test_images_of_half_precision_are_not_held_to_another_engine(run: Path) -> None:
    plan = store.read_json(run / "synth/plan.json")
    identity = plan["identity"] | {"engine.kind": "openvino", "engine.precision": "bf16"}
    document = plan | {"identity": identity}
    place = verification.places(run)[0]
    with pytest.raises(UsageError, match="openvino in bf16, whose rounding no other engine can repeat"):
        maker_of(place, document, "torch")


def test_a_signal_ends_it_and_nothing_is_said_to_continue(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = verification.StopRequest()
    stop.signal_number = 15
    monkeypatch.setattr(verification, "catch_signals", lambda: contextlib.nullcontext(stop))
    with pytest.raises(Interrupted) as stopped:
        verify(run)
    assert (stopped.value.signal_number, stopped.value.remedy) == (15, "the same command begins again")
