"""The distance band, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from engines.synthesis.select import class_band, distance_to, keeps


def test_the_reach_is_the_largest_distance_between_two_real_images() -> None:
    band = class_band(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 2.0]]))
    assert band.reach == pytest.approx(5.0)
    assert torch.allclose(band.mean, torch.tensor([1.0, 2.0]))
    assert distance_to(band, torch.tensor([2.0, 3.0])) == pytest.approx(math.sqrt(2))


def test_an_image_is_kept_up_to_the_band_and_dropped_beyond() -> None:
    band = class_band(torch.tensor([[0.0], [2.0]]))
    assert keeps(band, 4.0, width=2.0)
    assert not keeps(band, 4.001, width=2.0)


def test_a_class_of_one_image_has_no_band() -> None:
    assert keeps(class_band(torch.ones(1, 3)), 100.0, width=1.0)
