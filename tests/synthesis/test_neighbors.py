"""The two nearest points: those of all distances by hand, whatever the blocks, the threads and the rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engines.synthesis import neighbors as module
from engines.synthesis.neighbors import copy_ratios, nearest_two


def by_hand(views: Sequence[Tensor], real: Tensor, own: int = -1) -> list[tuple[float, int, bool]]:
    """All distances of one image, sorted: every difference in float64."""
    found = []
    for i, other in enumerate(real.double()):
        if i != own:
            distances = [float((view.double() - other).norm()) for view in views]
            found.append((min(distances), i, len(distances) == 2 and distances[1] < distances[0]))
    return sorted(found)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 30), st.sampled_from([1, 3, 50]), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_two_nearest_are_those_of_all_distances_by_hand(
    seed: int, real_count: int, count: int, dimension: int, mirrored: bool, features: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    top = 256 if dimension > 1 else 4  # on a line of four points: ties and duplicates
    real, images = (torch.randint(0, top, (n, dimension), generator=g, dtype=torch.uint8) for n in (real_count, count))
    views = [images, images.flip(1)] if mirrored else [images]
    if features:
        real, views = real.double() / 1e4 + 1, [view.double() / 1e4 + 1 for view in views]
    own = torch.arange(count) % (real_count + 1) - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "REAL_ROWS", 7)
        patch.setattr(module, "QUERY_ROWS", 5)
        found = nearest_two(views, real, own)
    for i in range(count):
        expected = by_hand([view[i] for view in views], real, int(own[i]))
        if not expected:
            assert found.first[i] == math.inf
            continue
        assert float(found.first[i]) == pytest.approx(expected[0][0], rel=1e-9, abs=1e-12)
        second = expected[1][0] if len(expected) > 1 else math.inf
        assert float(found.second[i]) == pytest.approx(second, rel=1e-9, abs=1e-12)
        if not features:  # integers: ties are ties
            assert (int(found.nearest[i]), bool(found.mirrored[i])) == expected[0][1:]


def test_images_that_float32_cannot_tell_apart_are_told_apart() -> None:
    """Twenty bright real images, each one gray level off in one pixel; the products' rounding exceeds the differences."""
    real = torch.full((20, 3072), 250, dtype=torch.uint8)
    for i in range(20):
        real[i, i] = 251
    image = real[13:14].clone()
    found = nearest_two([image], real)
    assert (int(found.nearest[0]), float(found.first[0]), float(found.second[0])) == (13, 0.0, pytest.approx(math.sqrt(2)))


def test_threads_change_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    real, images = (torch.randint(0, 256, (n, 48), generator=g, dtype=torch.uint8) for n in (300, 1200))
    with ThreadPoolExecutor(3) as pool:
        several = nearest_two([images], real, each=pool.map)
    assert all(torch.equal(a, b) for a, b in zip(several, nearest_two([images], real), strict=True))


def test_the_ratio_is_that_of_two_distances_and_one_where_there_is_nothing_to_compare_with() -> None:
    real = torch.tensor([[0.0], [10.0], [10.0 + 1e-7]], dtype=torch.float64)
    found = nearest_two([torch.tensor([[2.0], [0.0], [10.0]], dtype=torch.float64)], real)
    assert copy_ratios(found, resolution=1e-5).tolist() == [2 / 8, 0.0, 1.0], "the second nearest of the last is the same point"
    assert copy_ratios(nearest_two([real], real[:1])).tolist() == [1.0] * 3, "one real image: no second"


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_of_points_spread_evenly_over_m_dimensions_a_share_of_ratio_to_the_m_passes_for_copies(dimension: int) -> None:
    """What the module says of classes that a guide has drawn together."""
    g = torch.Generator().manual_seed(0)
    real = torch.rand(2000, dimension, generator=g, dtype=torch.float64)
    ratios = copy_ratios(nearest_two([0.25 + 0.5 * torch.rand(4000, dimension, generator=g, dtype=torch.float64)], real))
    for ratio in (1 / 3, 0.6):
        assert float((ratios <= ratio).double().mean()) == pytest.approx(ratio**dimension, abs=0.05)
