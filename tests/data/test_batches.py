"""Batches are pure functions of (seed, step); tensors are exact."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.data.batches import (
    by_class,
    class_batch,
    class_probabilities,
    generator,
    group_batch,
    natural_batch,
    to_pixels,
    to_tensor,
    torch_generator,
)

COUNTS = np.array([40, 12, 2])
MEMBERS = by_class(np.repeat(np.arange(3), COUNTS), 3)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**62))
def test_every_image_comes_once_an_epoch(count: int, batch_size: int, seed: int) -> None:
    steps = -(-3 * count // batch_size)
    stream = np.concatenate([natural_batch(count, batch_size, seed, step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_differ_in_order() -> None:
    assert not np.array_equal(natural_batch(100, 100, 0, 0), natural_batch(100, 100, 0, 1))


def test_a_batch_does_not_depend_on_those_before_it() -> None:
    cold = (
        natural_batch(1000, 64, 5, 77),
        class_batch(MEMBERS, np.full(3, 1 / 3), 16, 5, 77),
        group_batch(MEMBERS, np.full(3, 1 / 3), 4, 3, 5, 77),
    )
    for step in range(20):
        natural_batch(1000, 64, 5, step)
        class_batch(MEMBERS, np.full(3, 1 / 3), 16, 5, step)
    warm = (
        natural_batch(1000, 64, 5, 77),
        class_batch(MEMBERS, np.full(3, 1 / 3), 16, 5, 77),
        group_batch(MEMBERS, np.full(3, 1 / 3), 4, 3, 5, 77),
    )
    assert all((a == b).all() for a, b in zip(cold, warm, strict=True))


def test_a_batch_can_be_changed_without_changing_the_next_one() -> None:
    first = natural_batch(10, 10, 0, 0)
    kept = first.copy()
    first[:] = 0
    assert (natural_batch(10, 10, 0, 0) == kept).all()


def test_purposes_seeds_and_steps_are_independent() -> None:
    draws = [generator(*key).integers(0, 2**60) for key in ((0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", 1, 0), (0, "a", 10))]
    assert len(set(draws)) == len(draws)


def test_torch_generators_repeat() -> None:
    assert torch.rand(3, generator=torch_generator(1, "x", 2)).equal(torch.rand(3, generator=torch_generator(1, "x", 2)))
    assert not torch.rand(3, generator=torch_generator(1, "x", 2)).equal(torch.rand(3, generator=torch_generator(1, "x", 3)))


@pytest.mark.parametrize(
    ("how", "expected"), [("natural", [4 / 5, 1 / 5, 0]), ("balanced", [1 / 2, 1 / 2, 0]), ("sqrt", [2 / 3, 1 / 3, 0])]
)
def test_class_probabilities_by_hand(how: str, expected: list[float]) -> None:
    assert class_probabilities(np.array([16, 4, 0]), how) == pytest.approx(expected)  # type: ignore[arg-type]


def test_classes_are_drawn_as_often_as_their_probability_says() -> None:
    labels = np.repeat(np.arange(3), COUNTS)
    drawn = np.concatenate([labels[class_batch(MEMBERS, np.array([0.5, 0.3, 0.2]), 100, 0, step)] for step in range(50)])
    assert np.bincount(drawn) / 5000 == pytest.approx([0.5, 0.3, 0.2], abs=0.03)  # 4 standard deviations


def test_groups_hold_one_class_each_and_no_image_twice_where_there_are_enough() -> None:
    labels = np.repeat(np.arange(3), COUNTS)
    for step in range(30):
        for group in group_batch(MEMBERS, np.full(3, 1 / 3), 4, 5, 0, step).reshape(4, 5):
            k = labels[group[0]]
            assert (labels[group] == k).all()
            assert len(set(group.tolist())) == min(5, COUNTS[k])


def test_a_class_smaller_than_the_group_gives_each_image_equally_often() -> None:
    group = group_batch(MEMBERS, np.array([0.0, 0.0, 1.0]), 1, 5, 0, 0)
    assert sorted(np.bincount(group - 52).tolist()) == [2, 3]


def test_pixels_become_numbers_from_minus_one_to_one_and_back() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = to_tensor(pixels)
    assert x.shape == (1, 1, 16, 16)
    assert x.dtype == torch.float32
    assert (x.min().item(), x.max().item()) == (-1, 1)
    assert x[0, 0, 7, 15].item() == pytest.approx(127 / 127.5 - 1)
    assert (to_pixels(x) == pixels).all()


def test_channels_go_first() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), dtype=np.uint8)
    assert to_tensor(pixels)[1, 2, 0, 3].item() == pytest.approx(pixels[1, 0, 3, 2] / 127.5 - 1)
    assert (to_pixels(to_tensor(pixels)) == pixels).all()


def test_pixels_out_of_range_are_clipped() -> None:
    assert to_pixels(torch.tensor([-3.0, 3.0]).reshape(1, 1, 1, 2)).ravel().tolist() == [0, 255]
