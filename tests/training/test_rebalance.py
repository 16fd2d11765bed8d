"""Losses of a long tail: each by hand, at its limits, and against the one that it becomes there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from engines.recipe import Method, RecognizerSection
from engines.training.rebalance import (
    effective_number_weights,
    ldam_margins,
    log_prior,
    margin_offsets,
    rebalancing,
    smoothed_targets,
    smoothing_factors,
    soft_cross_entropy,
    weighted_cross_entropy,
)
from engines.training.recognizer import real_images

COUNTS = torch.tensor([1000.0, 81.0, 16.0, 1.0])


def test_balanced_softmax_is_the_formula_worked_by_hand() -> None:
    logits, counts = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([10.0, 4.0, 1.0])
    by_hand = -math.log(4 * math.exp(2.0) / (10 * math.exp(1.0) + 4 * math.exp(2.0) + 1 * math.exp(0.5)))
    value = weighted_cross_entropy(logits, torch.tensor([1]), torch.ones(1), (counts / counts.sum()).log())
    assert float(value) == pytest.approx(by_hand, rel=1e-6)


def test_a_zero_prior_is_cross_entropy_and_so_is_a_uniform_one() -> None:
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    expected = torch.nn.functional.cross_entropy(logits, labels)
    for prior in (torch.zeros(4), torch.full((4,), math.log(0.25))):
        torch.testing.assert_close(weighted_cross_entropy(logits, labels, torch.ones(6), prior), expected)


def test_a_weight_of_two_is_the_image_given_twice() -> None:
    logits, labels = torch.randn(3, 4), torch.tensor([0, 3, 2])
    twice = torch.tensor([0, 1, 1, 2])
    torch.testing.assert_close(
        weighted_cross_entropy(logits, labels, torch.tensor([1.0, 2.0, 1.0]), torch.zeros(4)),
        weighted_cross_entropy(logits[twice], labels[twice], torch.ones(4), torch.zeros(4)),
    )


def test_a_prior_leaves_out_a_class_that_cannot_occur() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    weighted_cross_entropy(logits, torch.tensor([0, 2]), torch.ones(2), torch.tensor([0.5, 0.0, 0.5]).log()).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[:, 1].any()


def test_priors_come_from_the_real_counts_or_from_all_images_by_weight() -> None:
    pixels = np.zeros((5, 8, 8, 1), np.uint8)
    images = real_images(pixels, np.array([0, 0, 0, 1, 1])).add(pixels, np.array([1, 1, 1, 1, 2]), weight=0.5)

    def prior(method: Method, own_law: bool) -> torch.Tensor:
        return rebalancing(*images.class_counts(3), RecognizerSection(), method, own_law, False).log_prior

    assert not prior("cross_entropy", True).any()
    real = prior("balanced_softmax", True)
    torch.testing.assert_close(real[0].exp(), torch.tensor([3 / 5, 2 / 5, 0.0]))
    assert not real[1].any()
    torch.testing.assert_close(prior("balanced_softmax", False).exp(), torch.tensor([[3.0, 4.0, 0.5]] * 2) / 7.5)


def test_logit_adjustment_at_tau_one_is_balanced_softmax_and_at_tau_two_squares_the_prior() -> None:
    section = RecognizerSection()
    adjusted = rebalancing(COUNTS, COUNTS, section, "logit_adjustment", True, False).log_prior
    assert torch.equal(adjusted, rebalancing(COUNTS, COUNTS, section, "balanced_softmax", True, False).log_prior)
    torch.testing.assert_close(log_prior(COUNTS, 2.0).exp(), (COUNTS / COUNTS.sum()) ** 2)


def test_effective_numbers_weigh_alike_at_beta_zero_and_as_the_inverse_count_as_beta_goes_to_one() -> None:
    torch.testing.assert_close(effective_number_weights(COUNTS, 0.0), torch.ones(4))
    inverse = 4 / COUNTS / (1 / COUNTS).sum()
    torch.testing.assert_close(effective_number_weights(COUNTS, 1 - 1e-12), inverse, rtol=1e-5, atol=0)


def test_effective_number_weights_are_the_formula_worked_by_hand_and_sum_to_the_classes() -> None:
    by_hand = [(1 - 0.9) / (1 - 0.9**n) for n in (1, 2, 3)]  # 1, 0.1 / 0.19, 0.1 / 0.271
    weights = effective_number_weights(torch.tensor([1.0, 2.0, 3.0, 0.0]), 0.9)
    assert weights.tolist() == pytest.approx([3 * w / sum(by_hand) for w in by_hand] + [0.0])


def test_a_margin_is_the_inverse_fourth_root_of_the_count_and_the_rarest_class_has_the_largest() -> None:
    assert ldam_margins(torch.tensor([81.0, 16.0, 1.0, 0.0]), 0.5).tolist() == pytest.approx([0.5 / 3, 0.5 / 2, 0.5, 0.0])


def test_ldam_is_the_formula_worked_by_hand() -> None:
    cosines, margin, scale = (0.2, 0.6), 0.5, 3.0
    right, other = math.exp(scale * (cosines[1] - margin)), math.exp(scale * cosines[0])
    offsets = margin_offsets(torch.tensor([1]), torch.tensor([margin]), scale, 2)
    value = weighted_cross_entropy(scale * torch.tensor([cosines]), torch.tensor([1]), torch.ones(1), offsets)
    assert float(value) == pytest.approx(-math.log(right / (right + other)), rel=1e-6)


def test_ldam_without_margins_at_scale_one_is_cross_entropy() -> None:
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    offsets = margin_offsets(labels, ldam_margins(COUNTS, 0.0)[labels], 1.0, 4)
    expected = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(weighted_cross_entropy(logits, labels, torch.ones(5), offsets), expected)


def test_smoothing_goes_from_the_tail_s_factor_to_the_head_s_along_a_sine() -> None:
    factors = smoothing_factors(torch.tensor([101.0, 51.0, 1.0]), head=0.4, tail=0.1)
    assert factors.tolist() == pytest.approx([0.4, 0.1 + 0.3 * math.sin(math.pi / 4), 0.1])
    assert smoothing_factors(torch.full((3,), 7.0), head=0.4, tail=0.1).tolist() == pytest.approx([0.1] * 3)


def test_a_smoothed_target_sums_to_one_and_its_loss_is_the_mixture_of_both_losses() -> None:
    logits, labels, factors = torch.randn(2, 4), torch.tensor([3, 1]), torch.tensor([0.4, 0.0])
    targets = smoothed_targets(labels, factors, 4)
    torch.testing.assert_close(targets.sum(1), torch.ones(2))
    log_p = logits.log_softmax(1)
    by_hand = (1 - factors) * -log_p[[0, 1], labels] + factors * -log_p.mean(1)
    torch.testing.assert_close(soft_cross_entropy(logits, targets), by_hand.mean())


def test_deferred_weights_are_ones_until_they_begin() -> None:
    early, late = (rebalancing(COUNTS, COUNTS, RecognizerSection(), "ldam_drw", False, late).class_weight for late in (False, True))
    assert torch.equal(early, torch.ones(2, 4))
    torch.testing.assert_close(late[0], effective_number_weights(COUNTS, 0.9999))


@pytest.mark.parametrize("method", ["balanced_softmax", "logit_adjustment", "class_balanced", "ldam_drw", "remix", "mislas"])
def test_under_its_own_law_an_extra_image_is_trained_on_as_by_cross_entropy(method: Method) -> None:
    def tables(of: Method) -> list[Any]:
        found = rebalancing(COUNTS, COUNTS + 7, RecognizerSection(), of, own_law=True, late=True)
        return [getattr(found, name)[1].tolist() for name in ("log_prior", "class_weight", "margin", "smoothing", "counts")]

    assert tables(method) == tables("cross_entropy")
