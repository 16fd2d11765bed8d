"""Guidance, Eqs. 4 and 13, on Gaussian classes, whose p(y | x) and gradient are known in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

from engines.diffusion.guidance import (
    GradientNorm,
    class_gradient,
    classifier_free,
    entropy_scale,
    normalize_gradient,
    prototype_guidance,
)

VARIANCE = 0.5
MEANS = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(5))
PRIOR = torch.tensor([0.6, 0.3, 0.1])
T = torch.tensor([7, 7])
Y = torch.tensor([1, 2])
X = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(6))


def log_probs(x: Tensor, _t: Tensor) -> Tensor:
    """log p(k | x) of classes N(MEANS[k], VARIANCE I) with PRIOR: (B, K)."""
    distance = (x[:, None] - MEANS).square().flatten(2).sum(2)
    return torch.log_softmax(PRIOR.log() - distance / (2 * VARIANCE), dim=1)


def true_gradient(x: Tensor, y: Tensor) -> Tensor:
    """(mu_y - sum_k p(k | x) mu_k) / v: the terms in x cancel."""
    expected = torch.einsum("bk,kchw->bchw", log_probs(x, T).exp(), MEANS)
    return (MEANS[y] - expected) / VARIANCE


def test_the_gradient_of_gaussian_classes_is_the_closed_form() -> None:
    gradient, all_classes = class_gradient(log_probs, X, T, Y)
    torch.testing.assert_close(gradient, true_gradient(X, Y), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(all_classes, log_probs(X, T))
    assert not gradient.requires_grad
    assert not all_classes.requires_grad


def test_the_gradient_is_found_where_gradients_are_off() -> None:
    with torch.no_grad():
        torch.testing.assert_close(class_gradient(log_probs, X, T, Y)[0], true_gradient(X, Y), rtol=1e-4, atol=1e-5)


def test_equation_4_is_the_fixed_scale_times_the_gradient_as_it_is() -> None:
    push = prototype_guidance(log_probs, Y, scale=3.0, scale_rule="fixed", gradient_norm="none")(X, T)
    assert push is not None
    torch.testing.assert_close(push.gradient, 3 * true_gradient(X, Y), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(push.log_prob, log_probs(X, T)[[0, 1], Y])
    assert push.scale.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("norm", ["rms", "linf", "l2", "none"])
@pytest.mark.parametrize("size", [1.0, 1e-25, 1e-37, 1e25])
def test_a_normalized_gradient_has_unit_size_image_by_image_however_small_or_large(norm: GradientNorm, size: float) -> None:
    gradient = (
        torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).double() * size * torch.tensor([1, 2, 3, 4]).view(4, 1, 1, 1)
    )
    measured = {
        "rms": lambda g: g.square().mean((1, 2, 3)).sqrt(),
        "linf": lambda g: g.abs().amax((1, 2, 3)),
        "l2": lambda g: g.flatten(1).norm(dim=1),
    }
    result = normalize_gradient(gradient.float(), norm).double()
    if norm == "none":
        torch.testing.assert_close(result, gradient.float().double())
    else:
        torch.testing.assert_close(measured[norm](result), torch.ones(4).double(), rtol=1e-2, atol=0)
        direction = torch.nn.functional.cosine_similarity(result.flatten(1), gradient.flatten(1) / size)
        assert direction.min() > 0.99


@pytest.mark.parametrize("norm", ["rms", "linf", "l2", "none"])
def test_a_gradient_of_zeros_stays_zero(norm: GradientNorm) -> None:
    assert torch.equal(normalize_gradient(torch.zeros(2, 1, 2, 2), norm), torch.zeros(2, 1, 2, 2))


@pytest.mark.parametrize("norm", ["rms", "linf", "l2", "none"])
def test_toward_raises_log_p_and_away_is_its_opposite(norm: GradientNorm) -> None:
    options: dict[str, Any] = {"scale": 0.01, "scale_rule": "fixed", "gradient_norm": norm}
    toward = prototype_guidance(log_probs, Y, direction="toward", **options)(X, T)
    away = prototype_guidance(log_probs, Y, direction="away", **options)(X, T)
    assert toward is not None
    assert away is not None
    now, rows = log_probs(X, T), [0, 1]
    assert (log_probs(X + toward.gradient, T)[rows, Y] > now[rows, Y]).all()
    assert (log_probs(X + away.gradient, T)[rows, Y] < now[rows, Y]).all()
    assert torch.equal(toward.gradient, -away.gradient)


def test_the_entropy_rule_is_s0_log_k_over_h_between_s0_and_the_cap() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, -1.0], [3.0, 0.0, 0.0], [100.0, 0.0, 0.0]])
    s = entropy_scale(logits.log_softmax(1), 0.2, 1.0)
    by_hand = 0.2 * math.log(3) / Categorical(logits=logits).entropy()
    assert float(s[0]) == pytest.approx(0.2)
    torch.testing.assert_close(s[1:3], by_hand[1:3], rtol=1e-4, atol=0)
    assert float(s[3]) == 1.0
    assert (s.diff() > 0).all()


def test_the_scale_of_an_image_does_not_depend_on_its_neighbors() -> None:
    together = prototype_guidance(log_probs, Y)(X, T)
    alone = [prototype_guidance(log_probs, Y[i : i + 1])(X[i : i + 1], T[i : i + 1]) for i in range(2)]
    assert together is not None
    for i, push in enumerate(alone):
        assert push is not None
        torch.testing.assert_close(together.gradient[i], push.gradient[0])
        torch.testing.assert_close(together.scale[i], push.scale[0])


def test_at_scale_0_guidance_asks_nothing_of_the_guide() -> None:
    def refuse(_x: Tensor, _t: Tensor) -> Tensor:
        raise AssertionError("the guide was asked")

    assert prototype_guidance(refuse, Y, scale=0.0)(X, T) is None


def test_a_gradient_that_an_engine_computes_takes_the_place_of_autograd() -> None:
    def refuse(_x: Tensor, _t: Tensor) -> Tensor:
        raise AssertionError("the guide was asked")

    by_autograd = prototype_guidance(log_probs, Y)(X, T)
    by_engine = prototype_guidance(refuse, Y, gradient=lambda x, t, y: (true_gradient(x, y), log_probs(x, t)))(X, T)
    assert by_autograd is not None
    assert by_engine is not None
    for expected, found in zip(by_autograd, by_engine, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_classifier_free_guidance_is_its_formula_for_eps_and_leaves_the_variance_values() -> None:
    def network(eps: float, values: float) -> Any:
        return lambda x, _t: torch.cat([torch.full_like(x, eps), torch.full_like(x, values)], 1)

    out = classifier_free(network(2.0, 10.0), network(0.5, 20.0), scale=0.5, channels=1)(X, T)
    assert out[:, :1].unique().tolist() == [1.5 * 2.0 - 0.5 * 0.5]
    assert out[:, 1:].unique().tolist() == [10.0]


def test_classifier_free_guidance_does_not_ask_for_the_null_label_at_scale_0() -> None:
    def refuse(_x: Tensor, _t: Tensor) -> Tensor:
        raise AssertionError("the network was asked")

    assert torch.equal(classifier_free(lambda x, _t: x, refuse, 0.0, 1)(X, T), X)
    torch.testing.assert_close(classifier_free(lambda x, _t: x, lambda x, _t: -x, 2.0, 1)(X, T), 5 * X)
