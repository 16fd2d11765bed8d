"""The pieces of the toy on which L_pair is judged: its long tail, its measures, one short adaptation, the picture."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="module")
def toy() -> ModuleType:
    path = Path(__file__).parent / "toy_pair_diversity.py"
    spec = importlib.util.spec_from_file_location("toy_pair_diversity", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_tail_is_five_images_that_no_unseen_one_repeats(toy: ModuleType) -> None:
    data, unseen = toy.long_tail(9, 1)
    assert data.counts.tolist()[-1] == 5
    assert data.groups == (*("many",) * 7, "few")
    assert set(unseen.labels.tolist()) == {9}
    five = {p.tobytes() for p in data.train.pixels(np.flatnonzero(data.train.labels == 7))}
    assert len(five) == 5
    assert not five & {p.tobytes() for p in unseen.pixels(np.arange(len(unseen)))}
    other, _ = toy.long_tail(9, 0)
    assert five != {p.tobytes() for p in other.train.pixels(np.flatnonzero(other.train.labels == 7))}


def test_the_five_themselves_are_copies_and_images_between_them_are_not(toy: ModuleType) -> None:
    data, unseen = toy.long_tail(8, 0)
    five = data.train.pixels(np.flatnonzero(data.train.labels == 7))
    others = unseen.pixels(np.arange(len(unseen)))
    itself = toy.measures(five, five, others, 1 / 3)
    assert (itself["copies"], itself["nearest"]) == (1.0, 0.0)
    between = (five.astype(np.int64) + np.roll(five, 1, axis=0)) // 2
    assert toy.measures(between.astype(np.uint8), five, others, 1 / 3)["copies"] == 0
    assert toy.measures(others, five, others, 1 / 3)["coverage"] == 0


def test_the_mean_distance_of_pairs_is_that_of_a_hand_worked_case(toy: ModuleType) -> None:
    assert toy.mean_pair_distance(np.array([[0.0], [3.0], [4.0]])) == pytest.approx((3 + 4 + 1) / 3)


def test_a_source_model_is_adapted_with_and_without_the_loss_and_the_images_make_a_picture(toy: ModuleType) -> None:
    data, _ = toy.long_tail(7, 0)
    torch.manual_seed(0)
    source = toy.build_unet(toy.recipe_of(), 8)
    before = [p.clone() for p in source.parameters()]
    made = []
    for arm in (toy.ARMS[0], toy.ARMS[2]):
        unet, loss = toy.adapt(source, data, toy.recipe_of(*arm.settings, "target.train_steps=1"))
        assert ("l_pair" in loss) == ("without" not in arm.name)
        made.append(toy.generate(unet, count=6, steps=2))
    assert all(torch.equal(a, b) for a, b in zip(before, source.parameters(), strict=True))
    assert made[0].shape == (6, 8, 8, 1)
    five = data.train.pixels(np.flatnonzero(data.train.labels == 7))
    with Image.open(io.BytesIO(toy.picture({7: (five, [*made, made[0]])}, 1 / 3))) as image:
        assert image.width > 800
