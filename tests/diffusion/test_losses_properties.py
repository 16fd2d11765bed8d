"""Eqs. 7-12 by invariances, and one case of each worked out on paper."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engines.diffusion.losses import (
    neighbor_log_probs,
    pair_diversity_loss,
    prototype_contrastive_loss,
    prototype_log_probs,
    update_prototypes,
)

seeds = st.integers(0, 2**31)
sizes = st.integers(3, 7)  # M


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def permutation(seed: int, n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def plane(*degrees: float) -> Tensor:
    """One group (1, M, 1, 1, 2) of two-pixel images at these angles, so that s(i, j) is the cosine of their difference."""
    angles = torch.tensor(degrees) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], -1).view(1, -1, 1, 1, 2)


# ------------------------------------------------------------------------------------------------------------- on paper


def test_equation_7_on_paper() -> None:
    # Images at 0, 90 and 180 degrees: s(1, 2) = 0, s(1, 3) = -1, s(2, 3) = 0; p(1 -> 2) = 1 / (1 + 1/e) = 0.7311
    p = neighbor_log_probs(plane(0, 90, 180), 1.0).exp()[0]
    torch.testing.assert_close(p, torch.tensor([[0.7311, 0.2689], [0.5, 0.5], [0.2689, 0.7311]]), rtol=1e-3, atol=0)


def test_equation_8_on_paper() -> None:
    # gamma N_k = 0.1 * 10 = 1 halves the similarities: p(1 -> 2) = 1 / (1 + exp(-1/2)) = 0.6225, entropy 0.6628 instead of 0.5823
    x = plane(0, 90, 180)
    _, source, target = pair_diversity_loss(x, x, torch.tensor([10]), gamma=0.1)
    assert float(source) == pytest.approx((2 * 0.58220 + math.log(2)) / 3, abs=1e-4)
    assert float(target) == pytest.approx((2 * 0.66284 + math.log(2)) / 3, abs=1e-4)


def test_equation_9_on_paper() -> None:
    # Rows 1 and 3: 0.6225 log(0.6225 / 0.7311) + 0.3775 log(0.3775 / 0.2689) = 0.0280; row 2: 0
    loss, _, _ = pair_diversity_loss(plane(0, 90, 180), plane(0, 90, 180), torch.tensor([10]), gamma=0.1)
    by_hand = 2 * (0.622459 * math.log(0.622459 / 0.731059) + 0.377541 * math.log(0.377541 / 0.268941))
    assert by_hand == pytest.approx(0.0559, abs=1e-4)
    assert float(loss) == pytest.approx(by_hand, rel=1e-3)


def test_equation_11_on_paper() -> None:
    # m = 0.6: 0.6 (1, 0) + 0.4 (0, 1) = (0.6, 0.4), over sqrt(0.52)
    moved = update_prototypes(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([0]), 0.6)
    torch.testing.assert_close(moved, torch.tensor([[0.6 / math.sqrt(0.52), 0.4 / math.sqrt(0.52)], [0.0, 1.0]]))


def test_equation_12_on_paper() -> None:
    # cosines 0.8 and 0.6 over tau = 0.1 are 8 and 6; prior 0.25 and 0.75: p(1) = e^2 0.25 / (e^2 0.25 + 0.75) = 0.7112
    feature, prototypes = torch.tensor([[0.8, 0.6]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    log_prior = torch.tensor([0.25, 0.75]).log()
    p = math.exp(2) * 0.25 / (math.exp(2) * 0.25 + 0.75)
    assert p == pytest.approx(0.7112, abs=1e-4)
    for label, wanted in ((0, -math.log(p)), (1, -math.log(1 - p))):
        loss = prototype_contrastive_loss(feature, torch.tensor([label]), prototypes, log_prior, tau=0.1)
        assert float(loss) == pytest.approx(wanted, rel=1e-4)


# ----------------------------------------------------------------------------------------------------------- invariances


@settings(max_examples=50, deadline=None)
@given(seeds, sizes, st.integers(1, 100))
def test_the_order_of_the_images_of_a_group_and_of_the_groups_does_not_change_the_pair_loss(seed: int, m: int, count: int) -> None:
    source, target = randn(seed, 2, m, 1, 3, 3), randn(seed + 1, 2, m, 1, 3, 3)
    counts = torch.tensor([count, 7])
    order = permutation(seed, m)
    loss, *entropies = pair_diversity_loss(source, target, counts, temperature=0.2)
    shuffled, *entropies_shuffled = pair_diversity_loss(source[:, order], target[:, order], counts, temperature=0.2)
    torch.testing.assert_close(shuffled, loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(entropies_shuffled, entropies, rtol=1e-4, atol=1e-5)
    swapped, _, _ = pair_diversity_loss(source.flip(0), target.flip(0), counts.flip(0), temperature=0.2)
    torch.testing.assert_close(swapped.flip(0), loss, rtol=1e-4, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(seeds, sizes, st.floats(1e-3, 1e3))
def test_the_scale_of_x0_does_not_change_the_pair_loss(seed: int, m: int, scale: float) -> None:
    source, target = randn(seed, 1, m, 1, 3, 3), randn(seed + 1, 1, m, 1, 3, 3)
    own = torch.linspace(scale, 1.0, m).view(1, m, 1, 1, 1)  # each image by a factor of its own: a cosine has no size
    loss, _, _ = pair_diversity_loss(source, target, torch.tensor([5]))
    scaled, _, _ = pair_diversity_loss(scale * source, own * target, torch.tensor([5]))
    torch.testing.assert_close(scaled, loss, rtol=1e-3, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(seeds, sizes, st.floats(0.05, 5), st.sampled_from(["tar||sou", "sou||tar"]))
def test_the_pair_loss_is_a_kl_so_never_negative_and_0_where_the_rows_agree(seed: int, m: int, temperature: float, way: str) -> None:
    source, target = randn(seed, 1, m, 1, 2, 2), randn(seed + 1, 1, m, 1, 2, 2)
    loss, entropy_source, entropy_target = pair_diversity_loss(
        source,
        target,
        torch.tensor([5]),
        direction=way,  # type: ignore[arg-type]
        temperature=temperature,
    )
    assert float(loss) > -1e-5
    for rows in (entropy_source, entropy_target):
        assert 0 <= float(rows) <= math.log(m - 1) + 1e-5
    same, _, _ = pair_diversity_loss(source, source, torch.tensor([5]), gamma=0.0, temperature=temperature)
    assert abs(float(same)) < 1e-6


def test_three_images_are_the_smallest_group_and_have_a_gradient() -> None:
    target = randn(1, 1, 3, 1, 2, 2).requires_grad_()
    pair_diversity_loss(randn(0, 1, 3, 1, 2, 2), target, torch.tensor([5]))[0].sum().backward()  # type: ignore[no-untyped-call]
    assert target.grad is not None
    assert (target.grad.flatten(2).norm(dim=2) > 0).all()


@pytest.mark.parametrize("m", [1, 2])
def test_fewer_images_are_refused_with_the_reason(m: int) -> None:
    with pytest.raises(AssertionError, match=r"with two images a row of Eq\. 7 has one entry and its loss is identically 0"):
        neighbor_log_probs(randn(0, 1, m, 1, 2, 2), 1.0)


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(1, 12), st.integers(1, 5))
def test_the_order_of_a_batch_does_not_change_equation_12_image_by_image(seed: int, batch: int, classes: int) -> None:
    features, prototypes = F.normalize(randn(seed, batch, 6), dim=1), F.normalize(randn(seed + 1, classes, 6), dim=1)
    labels = torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(seed))
    log_prior = F.log_softmax(randn(seed + 2, classes), dim=0)
    order, renamed = permutation(seed, batch), permutation(seed + 1, classes)
    loss = prototype_contrastive_loss(features, labels, prototypes, log_prior)
    again = prototype_contrastive_loss(features[order], labels[order], prototypes, log_prior)
    torch.testing.assert_close(again, loss[order], rtol=1e-4, atol=1e-5)  # 1 / tau enlarges the rounding of the cosines
    names = renamed.argsort()[labels]  # the same classes under other numbers
    torch.testing.assert_close(
        prototype_contrastive_loss(features, names, prototypes[renamed], log_prior[renamed]), loss, rtol=1e-4, atol=1e-5
    )
    assert (loss > -1e-5).all()


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(1, 20), st.floats(0.5, 0.9999))
def test_equation_11_keeps_unit_length_moves_no_class_without_images_and_classes_do_not_mix(seed: int, batch: int, momentum: float) -> None:
    prototypes, features = F.normalize(randn(seed, 4, 6), dim=1), F.normalize(randn(seed + 1, batch, 6), dim=1)
    labels = torch.randint(3, (batch,), generator=torch.Generator().manual_seed(seed))
    moved = update_prototypes(prototypes, features, labels, momentum)
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(moved[3], prototypes[3])
    for k in range(3):
        alone = update_prototypes(prototypes, features[labels == k], labels[labels == k], momentum)
        torch.testing.assert_close(alone[k], moved[k], rtol=1e-4, atol=1e-5)
    order = torch.cat([(labels == k).nonzero().flatten() for k in range(3)])  # classes one after another, each in its own order
    torch.testing.assert_close(update_prototypes(prototypes, features[order], labels[order], momentum), moved, rtol=1e-4, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(seeds, st.floats(-3, 3))
def test_only_the_ratios_of_the_prior_count(seed: int, constant: float) -> None:
    features, prototypes = F.normalize(randn(seed, 3, 6), dim=1), F.normalize(randn(seed + 1, 4, 6), dim=1)
    log_prior = randn(seed + 2, 4)
    torch.testing.assert_close(
        prototype_log_probs(features, prototypes, log_prior + constant),
        prototype_log_probs(features, prototypes, log_prior),
        rtol=1e-4,
        atol=1e-4,
    )
