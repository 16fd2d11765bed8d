"""The forward process: Eqs. 1, 2, 6, its posterior, respacing, the learned range; against float64 and Gaussian algebra."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch

from engines.diffusion.schedule import (
    at_timesteps,
    betas_of,
    learned_range_log_variance,
    make_schedule,
    posterior_mean,
    predict_eps,
    predict_x0,
    q_sample,
    respace,
)

SCHEDULES: tuple[Literal["linear", "cosine"], ...] = ("linear", "cosine")


def exact(name: Literal["linear", "cosine"], steps: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """betas and abar in float64, by NumPy."""
    if name == "linear":
        betas = 1e-4 + (0.02 - 1e-4) * np.arange(steps) / (steps - 1)
    else:
        abar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - abar[1:] / abar[:-1], 0.999)
    return betas, np.cumprod(1 - betas)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_tables_are_those_of_float64(name: Literal["linear", "cosine"]) -> None:
    schedule, (betas, abar) = make_schedule(name, 1000), exact(name)
    np.testing.assert_allclose(schedule.betas, betas, rtol=1e-6)
    np.testing.assert_allclose(schedule.alphas_cumprod, abar, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(schedule.alphas_cumprod_prev, np.r_[1.0, abar[:-1]], rtol=1e-6)
    assert schedule.timesteps.tolist() == list(range(1000))


def test_the_linear_schedule_runs_from_1e_4_to_0_02_and_ten_times_as_steep_at_100_steps() -> None:
    assert betas_of("linear", 1000)[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
    assert betas_of("linear", 100)[[0, -1]].tolist() == pytest.approx([1e-3, 0.2])
    assert float(betas_of("linear", 10).max()) == 0.999


def test_cosine_abar_is_the_squared_cosine_until_beta_is_capped() -> None:
    abar = make_schedule("cosine", 1000).alphas_cumprod.double()
    edge = (torch.arange(1, 1001) / 1000 + 0.008) / 1.008 * math.pi / 2
    wanted = edge.double().cos() ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(abar[:-1], wanted[:-1], rtol=2e-4, atol=1e-8)  # the last beta is the cap
    assert betas_of("cosine", 1000)[-1] == 0.999


@pytest.mark.parametrize("name", SCHEDULES)
def test_equation_2_is_equation_1_applied_t_times(name: Literal["linear", "cosine"]) -> None:
    schedule = make_schedule(name, 1000)
    mean, variance = 0.7, 0.0
    for t, beta in enumerate(exact(name)[0]):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        if t in (0, 1, 10, 500, 999):
            at = torch.tensor([t])
            still = q_sample(schedule, torch.full((1, 1, 1, 1), 0.7), at, torch.zeros(1, 1, 1, 1))
            one = q_sample(schedule, torch.zeros(1, 1, 1, 1), at, torch.ones(1, 1, 1, 1))
            assert float(still) == pytest.approx(mean, rel=1e-5, abs=1e-7)
            assert float(one) == pytest.approx(math.sqrt(variance), rel=1e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_equation_6_undoes_equation_2_at_every_t(name: Literal["linear", "cosine"]) -> None:
    schedule = make_schedule(name, 1000)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.rand(1000, 3, 4, 4, generator=generator) * 2 - 1, torch.randn(1000, 3, 4, 4, generator=generator)
    j = torch.arange(1000)
    x = q_sample(schedule, x0, j, noise)
    factor = schedule.alphas_cumprod.rsqrt().view(-1, 1, 1, 1)  # what Eq. 6 enlarges rounding by: 20,000 at the cosine's end
    assert bool(((predict_x0(schedule, x, j, noise) - x0).abs() < 2e-6 * factor).all())
    torch.testing.assert_close(predict_eps(schedule, x, j, predict_x0(schedule, x, j, noise)), noise, rtol=1e-3, atol=1e-3)


def test_equation_6_is_computed_in_float32_whatever_the_network_ran_in() -> None:
    schedule = make_schedule("linear", 1000)
    x, eps = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 0.5, dtype=torch.bfloat16)
    result = predict_x0(schedule, x, torch.tensor([999]), eps)
    assert result.dtype == torch.float32
    abar = exact("linear")[1][-1]
    assert float(result) == pytest.approx((1 - math.sqrt(1 - abar) * 0.5) / math.sqrt(abar), rel=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1000, 50])
def test_the_posterior_is_the_product_of_two_gaussians(name: Literal["linear", "cosine"], steps: int) -> None:
    # q(x_{t-1} | x_t, x_0) ~ N(x_{t-1}; sqrt(abar_{t-1}) x_0, 1 - abar_{t-1})  N(x_t; sqrt(1 - beta_t) x_{t-1}, beta_t)
    schedule = respace(make_schedule(name, 1000), steps)
    abar = exact(name)[1][schedule.timesteps.numpy()][1:]
    before = exact(name)[1][schedule.timesteps.numpy()][:-1]
    beta = 1 - abar / before
    precision = 1 / (1 - before) + (1 - beta) / beta
    j = torch.arange(1, steps)
    x0, x = torch.full((steps - 1, 1, 1, 1), 0.3), torch.full((steps - 1, 1, 1, 1), -0.8)
    mean = (np.sqrt(before) * 0.3 / (1 - before) + np.sqrt(1 - beta) * -0.8 / beta) / precision
    np.testing.assert_allclose(schedule.posterior_variance[1:], 1 / precision, rtol=1e-4)
    np.testing.assert_allclose(schedule.posterior_log_variance_clipped[1:], -np.log(precision), rtol=1e-4)
    np.testing.assert_allclose(posterior_mean(schedule, x0, x, j).flatten(), mean, rtol=1e-4, atol=1e-6)


def test_at_the_first_position_the_posterior_is_x0_itself_and_its_log_variance_that_of_the_next() -> None:
    schedule = make_schedule("linear", 1000)
    x0, x = torch.tensor([0.3]).view(1, 1, 1, 1), torch.tensor([5.0]).view(1, 1, 1, 1)
    assert float(posterior_mean(schedule, x0, x, torch.tensor([0]))) == pytest.approx(0.3)
    assert float(schedule.posterior_variance[0]) == 0
    assert schedule.posterior_log_variance_clipped[0] == schedule.posterior_log_variance_clipped[1]
    assert torch.isfinite(schedule.posterior_log_variance_clipped).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_respacing_keeps_abar_and_the_first_and_the_last_timestep(name: Literal["linear", "cosine"]) -> None:
    schedule = make_schedule(name, 1000)
    short = respace(schedule, 250)
    assert len(short) == 250
    assert short.timesteps[[0, -1]].tolist() == [0, 999]
    assert set(short.timesteps.diff().tolist()) <= {4, 5}
    torch.testing.assert_close(short.alphas_cumprod, schedule.alphas_cumprod[short.timesteps], rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(np.cumprod(1 - short.betas.double().numpy()), short.alphas_cumprod, rtol=1e-3, atol=1e-9)


def test_timesteps_of_any_respacing_increase_strictly() -> None:
    schedule = make_schedule("linear", 61)
    for steps in range(2, 62):
        timesteps = respace(schedule, steps).timesteps
        assert len(timesteps) == steps
        assert bool((timesteps.diff() > 0).all())
        assert timesteps[[0, -1]].tolist() == [0, 60]


def test_respacing_to_all_steps_changes_nothing() -> None:
    schedule = make_schedule("cosine", 100)
    same = respace(schedule, 100)
    torch.testing.assert_close(same.betas, schedule.betas)
    torch.testing.assert_close(same.posterior_mean_coef2, schedule.posterior_mean_coef2, rtol=1e-4, atol=1e-7)


def test_a_single_step_stands_at_the_last_timestep_where_x_is_noise() -> None:
    schedule = make_schedule("linear", 1000)
    one = respace(schedule, 1)
    assert one.timesteps.tolist() == [999]
    assert float(one.alphas_cumprod) == pytest.approx(float(schedule.alphas_cumprod[999]), rel=1e-4)
    assert torch.isfinite(one.posterior_log_variance_clipped).all()
    with pytest.raises(ValueError, match="1000 timesteps cannot give 0"):
        respace(schedule, 0)


def test_respacing_twice_keeps_training_timesteps() -> None:
    schedule = make_schedule("linear", 1000)
    twice = at_timesteps(at_timesteps(schedule, [0, 100, 500, 999]), [1, 3])
    assert twice.timesteps.tolist() == [100, 999]
    torch.testing.assert_close(twice.alphas_cumprod, schedule.alphas_cumprod[[100, 999]], rtol=1e-4, atol=0)


def test_the_learned_range_ends_at_the_posteriors_variance_and_at_beta_and_is_geometric_between() -> None:
    schedule = make_schedule("cosine", 1000)
    j = torch.tensor([1, 400, 998])

    def variance(value: float) -> torch.Tensor:
        return learned_range_log_variance(schedule, torch.full((3, 1, 1, 1), value), j).exp().flatten()

    torch.testing.assert_close(variance(-1), schedule.posterior_variance[j], rtol=1e-5, atol=0)
    torch.testing.assert_close(variance(1), schedule.betas[j], rtol=1e-5, atol=0)
    torch.testing.assert_close(variance(0), (schedule.posterior_variance[j] * schedule.betas[j]).sqrt(), rtol=1e-5, atol=0)


def test_moving_a_schedule_keeps_its_tables() -> None:
    schedule = make_schedule("linear", 10)
    moved = schedule.to("cpu")
    assert len(moved) == 10
    assert torch.equal(moved.betas, schedule.betas)
