"""Augmentation: what moves, what stays, and that it repeats."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from engines.data.augment import crop, flip, shift


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 200) -> Tensor:
    return torch.rand(count, 3, 6, 5, generator=seeded(9)) * 2 - 1


def test_flip_mirrors_about_half_and_leaves_the_rest() -> None:
    x = images()
    y = flip(x, seeded())
    mirrored = torch.tensor([bool((b == a.flip(2)).all()) for a, b in zip(x, y, strict=True)])
    kept = torch.tensor([bool((b == a).all()) for a, b in zip(x, y, strict=True)])
    assert (mirrored ^ kept).all()
    assert 70 < mirrored.sum() < 130


def test_shift_is_a_window_of_the_image_with_its_border_repeated() -> None:
    x = images(100)
    padded = pad(x, (2, 2, 2, 2), mode="replicate")
    y = shift(x, 2, seeded())
    seen = set()
    for a, b in zip(padded, y, strict=True):
        hits = [(i, j) for i in range(5) for j in range(5) if (a[:, i : i + 6, j : j + 5] == b).all()]
        assert len(hits) == 1
        seen.add(hits[0])
    assert len(seen) > 15  # of 25 offsets


def test_crop_is_a_window_of_the_image_padded_with_black() -> None:
    x = images(100)
    padded = pad(x, (1, 1, 1, 1), value=-1.0)
    for a, b in zip(padded, crop(x, 1, seeded()), strict=True):
        assert sum(bool((a[:, i : i + 6, j : j + 5] == b).all()) for i in range(3) for j in range(3)) == 1


def test_crop_by_more_than_the_image_is_black() -> None:
    x = torch.ones(50, 1, 2, 2)
    y = crop(x, 4, seeded())
    assert set(y.unique().tolist()) == {-1.0, 1.0}
    assert (y.flatten(1) == -1).all(1).any()


def test_no_reach_changes_nothing() -> None:
    x = images(4)
    assert shift(x, 0, seeded()).equal(x)
    assert crop(x, 0, seeded()).equal(x)


def test_the_same_generator_gives_the_same_images() -> None:
    x = images(10)
    for augment in (lambda g: flip(x, g), lambda g: shift(x, 2, g), lambda g: crop(x, 2, g)):
        assert augment(seeded(4)).equal(augment(seeded(4)))
        assert not augment(seeded(4)).equal(augment(seeded(5)))
