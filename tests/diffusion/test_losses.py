"""Eqs. 3 and 7-12 by hand, against torch.distributions, and by what their gradients reach."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, Normal, kl_divergence

from engines.diffusion.losses import (
    base_loss,
    discretized_log_likelihood,
    entropy,
    neighbor_log_probs,
    normal_kl,
    pair_diversity_loss,
    prototype_contrastive_loss,
    prototype_log_probs,
    update_prototypes,
    variational_loss,
)
from engines.diffusion.schedule import make_schedule, posterior_mean, predict_x0, q_sample


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(randn(*shape, seed=seed), dim=-1)


def test_equation_3_is_the_mean_square_of_each_image() -> None:
    noise = torch.tensor([[1.0, 2.0], [0.0, -4.0]]).view(2, 1, 1, 2)
    eps = torch.tensor([[0.0, 4.0], [0.0, 0.0]], dtype=torch.bfloat16).view(2, 1, 1, 2)
    assert base_loss(noise, eps).tolist() == [2.5, 8.0]


def test_the_kl_of_two_normals_is_that_of_torch_distributions() -> None:
    mean1, log1, mean2, log2 = randn(4, 50).unbind(0)
    wanted = kl_divergence(Normal(mean1, (log1 / 2).exp()), Normal(mean2, (log2 / 2).exp()))
    torch.testing.assert_close(normal_kl(mean1, log1, mean2, log2), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, -1.0), (0.73, -3.0), (-1.4, 0.5), (1.0, -4.0)])
def test_the_probabilities_of_all_256_levels_sum_to_one(mean: float, log_std: float) -> None:
    levels = torch.arange(256) / 127.5 - 1
    log_p = discretized_log_likelihood(levels.double(), torch.full((256,), mean).double(), torch.full((256,), log_std).double())
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-6)


def test_the_probability_of_a_level_is_the_normals_mass_of_its_bin_and_the_end_bins_are_open() -> None:
    normal = Normal(torch.tensor(0.2).double(), torch.tensor(0.3).double())
    levels = torch.tensor([-1.0, 100 / 127.5 - 1, 1.0]).double()
    below, above = normal.cdf(levels - 1 / 255), normal.cdf(levels + 1 / 255)
    wanted = torch.stack([above[0], above[1] - below[1], 1 - below[2]]).log()
    mean, log_std = torch.full((3,), 0.2).double(), torch.full((3,), math.log(0.3)).double()
    torch.testing.assert_close(discretized_log_likelihood(levels, mean, log_std), wanted, rtol=1e-5, atol=1e-6)


def test_the_variational_term_is_the_kl_of_torch_distributions_in_bits_per_value() -> None:
    schedule, j = make_schedule("linear", 1000), torch.tensor([1, 500, 999])
    x0, noise, eps, values = randn(3, 1, 4, 4).clamp(-1, 1), randn(3, 1, 4, 4, seed=1), randn(3, 1, 4, 4, seed=2), randn(3, 1, 4, 4, seed=3)
    x = q_sample(schedule, x0, j, noise)
    beta, low = schedule.betas[j].view(-1, 1, 1, 1), schedule.posterior_variance[j].view(-1, 1, 1, 1)
    sigma = torch.exp(0.5 * ((values + 1) / 2 * beta.log() + (1 - values) / 2 * low.log()))
    truth = Normal(posterior_mean(schedule, x0, x, j), low.sqrt())
    model = Normal(posterior_mean(schedule, predict_x0(schedule, x, j, eps), x, j), sigma)
    wanted = kl_divergence(truth, model).mean((1, 2, 3)) / math.log(2)
    torch.testing.assert_close(variational_loss(schedule, x0, x, j, eps, values), wanted, rtol=1e-3, atol=1e-5)


def test_at_the_first_step_the_variational_term_is_the_likelihood_of_the_image() -> None:
    schedule, j = make_schedule("linear", 1000), torch.tensor([0])
    x0 = (torch.randint(0, 256, (1, 1, 4, 4), generator=torch.Generator().manual_seed(0)) / 127.5 - 1).clamp(-1, 1)
    noise, values = randn(1, 1, 4, 4), randn(1, 1, 4, 4, seed=1)
    x = q_sample(schedule, x0, j, noise)
    low, high = math.log(float(schedule.posterior_variance[1])), math.log(float(schedule.betas[0]))
    log_std = ((values + 1) / 2 * high + (1 - values) / 2 * low) / 2
    nll = -discretized_log_likelihood(x0, predict_x0(schedule, x, j, 0.9 * noise), log_std).mean() / math.log(2)
    torch.testing.assert_close(variational_loss(schedule, x0, x, j, 0.9 * noise, values)[0], nll, rtol=1e-3, atol=1e-4)


def test_the_variational_term_is_zero_for_a_perfect_model_and_trains_the_variance_alone() -> None:
    schedule, j = make_schedule("cosine", 1000), torch.tensor([10, 700])
    x0, noise = randn(2, 1, 4, 4).clamp(-1, 1), randn(2, 1, 4, 4, seed=1)
    x = q_sample(schedule, x0, j, noise)
    assert variational_loss(schedule, x0, x, j, noise, torch.full_like(noise, -1)).abs().max() < 1e-5
    eps, values = noise.clone().requires_grad_(), torch.zeros_like(noise).requires_grad_()
    variational_loss(schedule, x0, x, j, eps, values).sum().backward()  # type: ignore[no-untyped-call]
    assert eps.grad is None
    assert values.grad is not None
    assert (values.grad != 0).all()


def hand_pair_loss(source: np.ndarray, target: np.ndarray, count: int, gamma: float, temperature: float, reverse: bool) -> float:
    """Eqs. 7-9 of one group (M, D) in float64, loop by loop."""

    def row(x: np.ndarray, i: int, divisor: float) -> np.ndarray:
        others = [j for j in range(len(x)) if j != i]
        s = np.array([x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j]) for j in others]) / divisor
        return np.exp(s) / np.exp(s).sum()

    total = 0.0
    for i in range(len(source)):
        p, q = row(target, i, temperature * (1 + gamma * count)), row(source, i, temperature)
        p, q = (q, p) if reverse else (p, q)
        total += float((p * np.log(p / q)).sum())
    return total


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("m", "gamma", "temperature"), [(3, 0.1, 1.0), (3, 0.0, 0.05), (5, 0.1, 0.2)])
def test_the_pair_wise_diversity_loss_is_equations_7_to_9_by_hand(m: int, gamma: float, temperature: float, reverse: bool) -> None:
    source, target = randn(2, m, 1, 4, 4), randn(2, m, 1, 4, 4, seed=1)
    counts = torch.tensor([5, 40])
    loss, _, _ = pair_diversity_loss(source, target, counts, gamma, "sou||tar" if reverse else "tar||sou", temperature)
    for g in range(2):
        a, b = (x[g].flatten(1).double().numpy() for x in (source, target))
        assert float(loss[g]) == pytest.approx(hand_pair_loss(a, b, int(counts[g]), gamma, temperature, reverse), rel=1e-3, abs=1e-7)


def test_both_entropies_are_those_of_the_rows_and_a_large_class_flattens_the_targets() -> None:
    x = randn(2, 4, 1, 4, 4)
    _, source, target = pair_diversity_loss(x, x, torch.tensor([5, 1000]), gamma=0.1, temperature=0.1)
    torch.testing.assert_close(source, Categorical(logits=neighbor_log_probs(x, 0.1)).entropy().mean(1))
    assert target[1] > target[0] > source.max()
    assert float(target[1]) == pytest.approx(math.log(3), abs=1e-2)


def test_equal_models_lose_nothing_without_gamma_and_something_with_it() -> None:
    x = randn(1, 4, 1, 4, 4)
    assert pair_diversity_loss(x, x, torch.tensor([5]), gamma=0.0)[0].abs().max() < 1e-6
    assert pair_diversity_loss(x, x, torch.tensor([5]), gamma=0.1)[0].min() > 1e-4


def test_with_two_images_equation_7_is_constant_so_they_are_refused() -> None:
    one_entry = F.log_softmax(randn(2, 1).requires_grad_(), dim=-1)
    assert one_entry.tolist() == [[0.0], [0.0]]
    with pytest.raises(AssertionError, match="identically 0"):
        pair_diversity_loss(randn(1, 2, 1, 4, 4), randn(1, 2, 1, 4, 4), torch.tensor([5]))


def test_the_gradient_of_the_pair_loss_reaches_the_target_alone() -> None:
    source, target = randn(1, 3, 1, 4, 4).requires_grad_(), randn(1, 3, 1, 4, 4, seed=1).requires_grad_()
    loss, entropy_source, entropy_target = pair_diversity_loss(source, target, torch.tensor([5]))
    assert not entropy_source.requires_grad
    assert not entropy_target.requires_grad
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert source.grad is None
    assert target.grad is not None
    assert target.grad.abs().max() > 0


def test_rows_do_not_see_the_image_itself_nor_another_group() -> None:
    x = randn(2, 3, 1, 4, 4)
    alone = torch.cat([neighbor_log_probs(x[g : g + 1], 1.0) for g in range(2)])
    torch.testing.assert_close(neighbor_log_probs(x, 1.0), alone)
    assert neighbor_log_probs(x, 1.0).shape == (2, 3, 2)
    torch.testing.assert_close(neighbor_log_probs(torch.ones(1, 4, 1, 2, 2), 1.0).exp(), torch.full((1, 4, 3), 1 / 3))


def test_autocast_does_not_round_similarities_nor_cosines() -> None:
    nearly_equal = 1 + 0.05 * randn(1, 4, 1, 8, 8)
    features, prototypes = unit(8, 128), unit(5, 128, seed=1)
    rows, log_p = neighbor_log_probs(nearly_equal, 1.0), prototype_log_probs(features, prototypes, torch.zeros(5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(neighbor_log_probs(nearly_equal, 1.0), rows)
        assert torch.equal(prototype_log_probs(features, prototypes, torch.zeros(5)), log_p)
    assert rows.std() > 0


def test_entropy_is_log_k_at_most_and_0_at_least() -> None:
    assert float(entropy(torch.full((7,), -math.log(7)))) == pytest.approx(math.log(7))
    assert float(entropy(torch.tensor([0.0, -200.0, -200.0]))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("momentum", [0.999, 0.9, 0.0])
def test_equation_11_in_closed_form_is_one_update_after_the_other(momentum: float) -> None:
    prototypes, features = unit(4, 16), unit(40, 16, seed=1)
    labels = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(2))  # class 3 has no image
    c = prototypes.double().numpy().copy()
    for f, k in zip(features.double().numpy(), labels.tolist(), strict=True):
        c[k] = momentum * c[k] + (1 - momentum) * f
    c /= np.linalg.norm(c, axis=1, keepdims=True)
    updated = update_prototypes(prototypes, features, labels, momentum)
    np.testing.assert_allclose(updated, c, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(updated[3], prototypes[3])
    torch.testing.assert_close(updated.norm(dim=1), torch.ones(4))


def test_five_images_a_class_move_a_prototype_by_half_a_percent_an_epoch() -> None:
    prototype, feature = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]).repeat(5, 1)
    assert float(update_prototypes(prototype, feature, torch.zeros(5, dtype=torch.int64), 0.999)[0, 1]) == pytest.approx(0.005, rel=1e-2)


def test_equation_12_is_the_prior_weighted_softmax_by_hand() -> None:
    features, prototypes, tau = unit(6, 8), unit(3, 8, seed=1), 0.07
    prior, labels = np.array([0.7, 0.25, 0.05]), torch.tensor([0, 1, 2, 2, 1, 0])
    weighted = prior * np.exp(features.double().numpy() @ prototypes.double().numpy().T / tau)
    p = weighted / weighted.sum(1, keepdims=True)
    log_prior = torch.from_numpy(np.log(prior)).float()
    log_p = prototype_log_probs(features, prototypes, log_prior, tau)
    np.testing.assert_allclose(log_p.exp(), p, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(log_p.exp().sum(1), 1, rtol=1e-5)
    loss = prototype_contrastive_loss(features, labels, prototypes, log_prior, tau)
    np.testing.assert_allclose(loss, -np.log(p[np.arange(6), labels]), rtol=1e-3, atol=1e-5)


def test_prototypes_get_no_gradient_from_equation_12() -> None:
    features, prototypes = unit(6, 8).requires_grad_(), unit(3, 8, seed=1).requires_grad_()
    prototype_contrastive_loss(features, torch.tensor([0, 1, 2, 2, 1, 0]), prototypes, torch.zeros(3)).sum().backward()  # type: ignore[no-untyped-call]
    assert prototypes.grad is None
    assert features.grad is not None
    assert features.grad.abs().max() > 0
