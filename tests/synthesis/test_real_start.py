"""Images that begin from real ones: which ones, how far noised, what is said of it, and that they come out again bit for bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engines import recipe as recipes
from engines import store
from engines.data.batches import to_tensor
from engines.data.longtail import LongTail, prepare
from engines.diffusion.noise import batch_noise, image_key
from engines.errors import ConflictError, UsageError
from engines.store import RunFolder
from engines.synthesis.maker import Maker, open_maker
from engines.synthesis.plan import ImageId
from engines.synthesis.real_start import real_starts
from engines.synthesis.sheet import decode_png, encode_png, read_images
from engines.synthesis.synthesize import synthesize
from engines.synthesis.verify import verify

FROM_CLASS = ("synth.engine=torch", "synth.start=class", "synth.strength=0.5")


def silent_log(_: object) -> None:
    pass


def opened(path: Path, *settings: str) -> RunFolder:
    return store.open_run(path, settings)


@pytest.fixture(scope="module")
def data(tiny_run: Path) -> LongTail:
    return prepare(opened(tiny_run).recipe.data, None)


@pytest.fixture
def maker(tiny_run: Path, data: LongTail) -> Maker:
    return open_maker(opened(tiny_run, *FROM_CLASS), "target", data=data)


@pytest.mark.parametrize("start", ["class", "head", "any"])
def test_an_image_begins_from_one_of_those_that_are_named(start: str, tiny_run: Path, data: LongTail) -> None:
    starts = real_starts(opened(tiny_run, f"synth.start={start}").recipe, data)
    assert starts is not None
    found = {starts.of(9, image_key(0, 9, index)) for index in range(2000)}
    labels = data.train.labels
    expected = {"class": labels == 9, "head": np.isin(labels, data.classes_of("many")), "any": labels >= 0}[start]
    assert found == set(np.flatnonzero(expected).tolist())


def test_noise_begins_from_none(tiny_run: Path, data: LongTail) -> None:
    assert real_starts(opened(tiny_run).recipe, data) is None


def test_without_a_head_class_there_is_none_to_begin_from(tiny_run: Path, data: LongTail) -> None:
    with pytest.raises(UsageError, match="finds no head class"):
        real_starts(opened(tiny_run, "synth.start=head").recipe, replace(data, groups=("few",) * 10))


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 4), (0.7, 3), (0.34, 2), (0.1, 1)])
def test_the_network_first_sees_the_image_noised_to_the_last_timestep_below_the_strength(
    strength: float, steps: int, maker: Maker, data: LongTail
) -> None:
    synth = maker.recipe.synth.model_copy(update={"strength": strength})
    shorter = replace(maker, recipe=maker.recipe.model_copy(update={"synth": synth}))
    seen: list[tuple[Tensor, Tensor]] = []

    class Spy:
        card = maker.engine.card

        def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            seen.append((x.clone(), t.clone()))
            return maker.engine(x, t, y)

    image = ImageId(9, 3)
    replace(shorter, engine=Spy()).draw([image], silent_log)
    everywhere = [0, 333, 666, 999]
    assert [int(t[0]) for _, t in seen] == everywhere[:steps][::-1]
    start = shorter.start_of(image)
    assert start is not None
    key, t0 = image_key(synth.seed, 9, 3), everywhere[steps - 1]
    x0, z = to_tensor(data.train.pixels(np.array([start]))), batch_noise([key], 0, (1, 8, 8))
    u = (np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2
    beta = np.minimum(1 - np.cos(u[1:]) ** 2 / np.cos(u[:-1]) ** 2, 0.999)
    abar = np.cumprod(1 - beta)[t0]
    assert torch.allclose(seen[0][0][0], (abar**0.5 * x0 + (1 - abar) ** 0.5 * z)[0], atol=1e-5)


def test_an_image_is_the_same_whatever_else_is_in_its_batch_and_differs_from_others_of_its_start(maker: Maker) -> None:
    images = [ImageId(9, index) for index in range(4)]
    together = maker.draw(images, silent_log)
    assert len({maker.start_of(image) for image in images}) < 4  # of three nines
    assert len({one.pixels.tobytes() for one in together if one.pixels is not None}) == 4
    for one in together:
        assert np.array_equal(maker.draw([one.image], silent_log)[0].pixels, one.pixels)  # type: ignore[arg-type]


def test_a_little_noise_leaves_the_image_and_all_of_it_next_to_nothing(maker: Maker, data: LongTail) -> None:
    def apart(strength: float) -> float:
        """Mean distance of generated images to those from which they begin, of 255."""
        synth = maker.recipe.synth.model_copy(update={"strength": strength, "steps": 100, "guidance_scale": 0.0})
        shorter = replace(maker, recipe=maker.recipe.model_copy(update={"synth": synth}))
        drawn = shorter.draw([ImageId(9, index) for index in range(4)], silent_log)
        starts = data.train.pixels(np.array([shorter.start_of(one.image) for one in drawn]))
        return float(np.mean([np.abs(one.pixels.astype(int) - start).mean() for one, start in zip(drawn, starts, strict=True)]))  # type: ignore[union-attr]

    little, much = apart(0.03), apart(1.0)
    assert little < 10
    assert much > 5 * little


def test_a_strength_that_leaves_no_step_is_refused_and_noise_has_none() -> None:
    settings = ("synth.start=any", "synth.strength=0.5", "synth.steps=1")
    with pytest.raises(UsageError, match=r"synth.strength 0.5 leaves no step of synth.steps 1"):
        recipes.load('name = "x"', settings)
    assert recipes.load('name = "x"', settings[1:]).sampling_timesteps() == [999]


def test_the_plan_names_the_start_only_where_there_is_one(tiny_run: Path, data: LongTail) -> None:
    def plan(*settings: str) -> Any:
        return open_maker(opened(tiny_run, "synth.engine=torch", *settings), "target", data=data).plan

    noise, other = plan(), plan("synth.strength=0.3")
    assert noise.id == other.id
    assert not {"synth.start", "synth.strength"} & set(noise.identity)
    ids = {plan(*FROM_CLASS[1:]).id, plan("synth.start=class", "synth.strength=0.3").id, plan("synth.start=any").id, noise.id}
    assert len(ids) == 4


def test_other_data_than_the_runs_are_refused(tiny_run: Path) -> None:
    run = opened(tiny_run, *FROM_CLASS)
    other = prepare(run.recipe.data.model_copy(update={"profile_seed": 7}), None)
    with pytest.raises(ConflictError, match="trained on other images"):
        open_maker(run, "target", data=other)


@pytest.fixture(scope="module")
def made(exported_run: Path, data: LongTail, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    path = tmp_path_factory.mktemp("from_class") / "digits-lt"
    shutil.copytree(exported_run, path)
    run = opened(path, *FROM_CLASS, "synth.engine=onnx")
    synthesize(run, {8: 5, 9: 6}, originals=data)
    return run


def test_every_file_says_from_which_training_image_it_begins(made: RunFolder, data: LongTail) -> None:
    lines = [json.loads(line) for line in (made.synth / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 11
    for line in lines:
        assert data.train.labels[line["start"]] == line["class_id"]
        _, record = decode_png((made.synth / line["file"]).read_bytes(), line["class"], "")
        assert record.start == line["start"]
    pixels, _ = read_images(made.synth)
    assert len(pixels) == 11


def test_they_come_out_again_bit_for_bit(made: RunFolder) -> None:
    [found] = verify(made.path, sample=11)
    assert (found.equal, found.disagreements, found.failure) == (11, (), None)


def test_images_from_noise_come_out_again_from_a_run_whose_recipe_begins_from_real_ones(
    exported_run: Path, data: LongTail, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(exported_run, tmp_path / "digits-lt"))
    other = opened(path, *FROM_CLASS, "select.novelty_band=[0.1, 100]").recipe
    (path / "recipe.toml").write_text(recipes.to_toml(other), encoding="utf-8")
    typed = ("synth.engine=torch", "synth.start=noise", "select.novelty_band=[0, 0]")
    synthesize(opened(path, *typed), {9: 3}, originals=data)
    [found] = verify(path, sample=3)
    assert (found.equal, found.disagreements, found.failure) == (3, (), None)


def test_a_wrong_start_is_found_in_the_manifest_and_in_a_file_that_agrees_with_it(made: RunFolder, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made.path, tmp_path / "run"))
    manifest = copy / "synth" / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    lines[0]["start"] += 1
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    name = lines[0]["file"]
    [wrong] = verify(copy, sample=0)
    assert [file for file, _ in wrong.disagreements] == [name]
    path = copy / "synth" / name
    pixels, record = decode_png(path.read_bytes(), lines[0]["class"], "")
    path.write_bytes(encode_png(pixels, replace(record, start=lines[0]["start"])))
    [files_alone] = verify(copy, sample=0)
    assert files_alone.disagreements == ()
    [remade] = verify(copy, sample=11)
    [(file, what)] = remade.disagreements
    assert file == name
    assert what.startswith(f"it says start={lines[0]['start']}, remade from ")
