"""Gaussian data, whose exact denoiser is known: what each sampler draws, without sampling error.

Every sampler is affine in its noise for such a denoiser. So an image of zero noise is the output's mean, and images with a single 1 in
their noise give, one by one, the columns of its covariance: what is left against the truth is discretization error alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from engines.diffusion.guidance import LogProbs, prototype_guidance
from engines.diffusion.sampler import Denoiser, Sampler, sample
from engines.diffusion.schedule import Schedule, make_schedule, respace

MEAN = torch.tensor([0.3, -0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.20, 0.06], [0.06, 0.08]], dtype=torch.float64)
W = torch.tensor([0.8, -0.4], dtype=torch.float64)  # p(y | x_0) ~ exp(W . x_0)
EYE = torch.eye(2, dtype=torch.float64)


def abar_at(name: Literal["linear", "cosine"]) -> Tensor:
    return torch.cumprod(1 - make_schedule(name, 1000).betas.double(), 0)


def gain(abar: Tensor, covariance: Tensor) -> Tensor:
    """d E[x_0 | x_t] / d x_t = sqrt(abar) S (abar S + (1 - abar) I)^-1."""
    return abar.sqrt() * covariance @ torch.linalg.inv(abar * covariance + (1 - abar) * EYE)


def denoiser(name: Literal["linear", "cosine"], schedule: Schedule, covariance: Tensor, learned: bool = False) -> Denoiser:
    """The exact eps of N(MEAN, covariance); with `learned` (isotropic data) also the values that make Sigma the exact reverse variance."""
    abars = abar_at(name)
    place = {t: j for j, t in enumerate(schedule.timesteps.tolist())}

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        abar = abars[t[0]]
        x0 = MEAN + (x.flatten(1).double() - abar.sqrt() * MEAN) @ gain(abar, covariance).t()
        eps = ((x.flatten(1).double() - abar.sqrt() * x0) / (1 - abar).sqrt()).view(x.shape)
        if not learned:
            return eps
        j = place[int(t[0])]
        left = float(covariance[0, 0]) * (1 - abar) / (abar * covariance[0, 0] + 1 - abar)  # Var(x_0 | x_t)
        low, high = float(schedule.posterior_log_variance_clipped[j]), math.log(float(schedule.betas[j]))
        true = math.log(float(schedule.posterior_variance[j]) + float(schedule.posterior_mean_coef1[j]) ** 2 * float(left))
        return torch.cat([eps, torch.full_like(eps, 2 * (true - low) / (high - low) - 1 if j else 0.0)], dim=1)

    return denoise


def linear_classifier(name: Literal["linear", "cosine"], covariance: Tensor) -> LogProbs:
    """log p(y | x_t) but for a constant: E[exp(W . x_0) | x_t] of Gaussian data is again exp-linear in x_t."""
    abars = abar_at(name)

    def log_probs(x: Tensor, t: Tensor) -> Tensor:
        return x.flatten(1).double() @ (gain(abars[t[0]], covariance).t() @ W)[:, None]

    return log_probs


def mean_and_covariance(run: Callable[[Callable[[int], Tensor], int], Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """Of the sampler's output for standard normal noise, exactly. run(noise, batch) -> (batch, 1, 1, 2)."""
    batch = 1 + 2 * (steps + 1)

    def noise(step: int) -> Tensor:
        z = torch.zeros(batch, 1, 1, 2)
        z[1 + 2 * step, 0, 0, 0] = z[2 + 2 * step, 0, 0, 1] = 1.0
        return z

    out = run(noise, batch).flatten(1).double()
    columns = out[1:] - out[0]
    return out[0], columns.t() @ columns


def measure(
    name: Literal["linear", "cosine"],
    steps: int | str,
    covariance: Tensor,
    learned: bool = False,
    scale: float = 0.0,
    **options: Any,
) -> tuple[float, float]:
    """The largest error of the mean, and of the covariance, against N(MEAN + s S W, S)."""
    schedule = respace(make_schedule(name, 1000), steps)
    denoise = denoiser(name, schedule, covariance, learned)

    def run(noise: Callable[[int], Tensor], batch: int) -> Tensor:
        y = torch.zeros(batch, dtype=torch.int64)
        guidance = prototype_guidance(linear_classifier(name, covariance), y, scale, scale_rule="fixed", gradient_norm="none")
        return sample(denoise, schedule, noise, guidance, step_unit="variance", clip_denoised=False, **options)

    mean, found = mean_and_covariance(run, len(schedule))
    return float((mean - MEAN - scale * covariance @ W).abs().max()), float((found - covariance).abs().max())


SCHEDULES: tuple[Literal["linear", "cosine"], ...] = ("linear", "cosine")
SAMPLERS: list[tuple[Sampler, float]] = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("dpmpp_2m", 0.0)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
def test_in_a_thousand_steps_every_sampler_draws_the_data(name: Literal["linear", "cosine"], sampler: Sampler, eta: float) -> None:
    mean, covariance = measure(name, 1000, COVARIANCE, sampler=sampler, eta=eta)
    assert mean < 1e-3  # of x_T the linear schedule leaves sqrt(abar) = 0.006 of the data, which starting from pure noise forgets
    assert covariance < (1e-4 if sampler == "dpmpp_2m" else 4e-3)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [250, 10, "10,15,25", "ddim50"])
def test_ddpm_with_the_exact_learned_variance_draws_the_data_in_any_number_of_steps(
    name: Literal["linear", "cosine"], steps: int | str
) -> None:
    mean, covariance = measure(name, steps, 0.2 * EYE, learned=True)
    left = 6e-3 if steps == "ddim50" and name == "cosine" else 1e-5  # ddim50 begins at t = 980, where the data is not all gone
    assert mean < left
    assert covariance < 2e-4


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("sampler", "order"), [("ddpm", 1), ("ddim", 1), ("dpmpp_2m", 2)])
def test_twice_the_steps_halve_the_error_and_quarter_that_of_second_order(
    name: Literal["linear", "cosine"], sampler: Sampler, order: int
) -> None:
    coarse, fine = (measure(name, steps, COVARIANCE, sampler=sampler)[1] for steps in (100, 200))
    assert coarse / fine == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
def test_a_linear_classifier_tilts_the_gaussian_by_s_times_s_w_and_leaves_its_covariance(
    name: Literal["linear", "cosine"], sampler: Sampler, eta: float
) -> None:
    # exp(s W . x) N(x; m, S) = N(x; m + s S W, S) but for a constant; the shift is (0.20, 0.02)
    mean, covariance = measure(name, 500, COVARIANCE, scale=1.5, sampler=sampler, eta=eta)
    assert mean < (1e-2 if sampler == "ddpm" else 2e-3)  # Eq. 4 takes the gradient at x_t for a step to x_{t-1}: an error of first order
    assert covariance < (3e-4 if sampler == "dpmpp_2m" else 8e-3)


@pytest.mark.parametrize(
    ("sampler", "steps", "error"), [("ddpm", 250, 2e-2), ("ddim", 50, 2e-3), ("ddim", "10,15,25", 2e-3), ("dpmpp_2m", "ddim50", 2e-3)]
)
def test_respaced_samplers_tilt_it_too(sampler: Sampler, steps: int | str, error: float) -> None:
    assert measure("linear", steps, COVARIANCE, scale=1.5, sampler=sampler)[0] < error


def test_equation_4_comes_closer_to_the_tilt_with_more_steps() -> None:
    errors = [measure("cosine", steps, COVARIANCE, scale=1.5)[0] for steps in (125, 250, 500)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.15)
