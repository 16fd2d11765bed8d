"""Second stages: classifiers rescaled, normalized and made anew, and class-balanced draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from engines.training.second_stage import ScaledLinear, balanced_indices, best_tau, fresh_classifier, tau_normalized


def linear(weight: list[list[float]], bias: list[float]) -> nn.Linear:
    made = nn.Linear(len(weight[0]), len(weight))
    made.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    return made


def test_tau_zero_changes_nothing_and_tau_one_makes_all_rows_one_long() -> None:
    before = linear([[3.0, 4.0], [0.0, 0.5]], [1.0, 2.0])
    same = tau_normalized(before, 0.0)
    assert torch.equal(same.weight, before.weight)
    assert torch.equal(same.bias, before.bias)
    one = tau_normalized(before, 1.0)
    torch.testing.assert_close(one.weight, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
    torch.testing.assert_close(one.bias, torch.tensor([0.2, 4.0]))
    torch.testing.assert_close(tau_normalized(before, 2.0).weight[0], torch.tensor([3.0, 4.0]) / 25)


def test_the_best_tau_is_the_middle_of_those_that_get_every_held_out_class_right() -> None:
    skewed = linear([[4.0, 0.0], [0.0, 1.0]], [0.0, 0.0])  # a rare image (1, 2) has logits 4 / 4^tau and 2: right from tau = 0.6 on
    features, labels = torch.tensor([[3.0, 0.1], [3.0, 0.1], [1.0, 2.0]]), torch.tensor([0, 0, 1])
    assert best_tau(skewed, features, labels) == pytest.approx(1.3)  # of 0.6 to 2
    assert best_tau(skewed, features[:2], labels[:2]) == 1.0  # every tau is right
    assert best_tau(skewed, features[:0], labels[:0]) == 1.0


def test_fresh_scales_change_no_logit_and_learned_ones_fold_into_a_plain_layer() -> None:
    before, features = linear([[1.0, 2.0], [3.0, -1.0]], [0.5, -0.5]), torch.randn(4, 2)
    scaled = ScaledLinear(before)
    assert torch.equal(scaled(features), before(features))
    with torch.no_grad():
        scaled.scale.copy_(torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(scaled.folded()(features), scaled(features))
    torch.testing.assert_close(scaled(features), before(features) * torch.tensor([2.0, 0.5]))


def test_a_fresh_classifier_is_of_the_same_shape_and_a_function_of_its_seed() -> None:
    before = linear([[1.0, 2.0], [3.0, -1.0]], [0.5, -0.5])
    first, again = (fresh_classifier(before, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, before.weight)
    assert not first.bias.any()


def test_balanced_draws_take_each_class_alike_and_within_it_each_image_by_its_weight() -> None:
    labels = np.array([2, 0, 0, 0, 0, 0, 0, 2, 5])  # classes 1, 3 and 4 have no images
    weights = np.array([1.0, 1, 1, 1, 1, 1, 1, 0.25, 1], np.float32)
    drawn = balanced_indices(labels, weights, 30_000, np.random.default_rng(0))
    classes = np.bincount(labels[drawn], minlength=6) / len(drawn)
    assert classes == pytest.approx([1 / 3, 0, 1 / 3, 0, 0, 1 / 3], abs=0.01)
    assert (drawn == 7).sum() / (drawn == 0).sum() == pytest.approx(0.25, abs=0.02)
