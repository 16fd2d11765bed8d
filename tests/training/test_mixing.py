"""Mixup and Remix: shares by the table, partners of the same source."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engines.training.mixing import Mixture, draw_mixture, remix_shares


def test_a_mixed_image_is_the_share_of_one_and_the_rest_of_the_other() -> None:
    x = torch.tensor([1.0, 3.0, 5.0]).view(3, 1, 1, 1)
    assert Mixture(0.75, torch.tensor([1, 2, 0])).images(x).flatten().tolist() == [1.5, 3.5, 4.0]


@pytest.mark.parametrize(
    ("share", "n", "other", "expected"),
    [
        (0.4, 300.0, 100.0, 0.0),  # three times as common, and less than half of the image: the rare partner's label
        (0.6, 300.0, 100.0, 0.6),  # more than half of the image is the common one's
        (0.4, 299.0, 100.0, 0.4),  # not three times as common
        (0.6, 100.0, 300.0, 1.0),  # the rare first image's label
        (0.5, 100.0, 300.0, 0.5),  # 1 - lam < tau is strict
        (0.4, 100.0, 300.0, 0.4),
        (0.3, 5.0, 5.0, 0.3),
    ],
)
def test_the_label_of_a_remixed_image_is_the_rarer_class_s_as_the_rule_says(share: float, n: float, other: float, expected: float) -> None:
    shares = remix_shares(share, torch.tensor([n]), torch.tensor([other]), kappa=3.0, tau=0.5)
    assert shares.tolist() == pytest.approx([expected])


def test_without_a_threshold_remix_is_mixup() -> None:
    shares = remix_shares(0.2, torch.tensor([900.0, 1.0]), torch.tensor([1.0, 900.0]), kappa=np.inf, tau=0.5)
    assert shares.tolist() == pytest.approx([0.2, 0.2])


def test_partners_are_a_permutation_within_real_and_within_extra_images() -> None:
    is_extra = torch.arange(40) % 3 == 0
    mixture = draw_mixture(is_extra, 1.0, np.random.default_rng(0))
    assert mixture.partner.sort().values.tolist() == list(range(40))
    assert torch.equal(is_extra[mixture.partner], is_extra)
    assert not torch.equal(mixture.partner, torch.arange(40))


def test_shares_of_alpha_one_are_uniform() -> None:
    shares = [draw_mixture(torch.zeros(2, dtype=torch.bool), 1.0, np.random.default_rng(seed)).share for seed in range(2000)]
    assert np.quantile(shares, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.05)
