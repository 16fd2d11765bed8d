"""Schedules, single steps and whole trajectories against the schedulers of `diffusers`, which were written independently."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from engines.diffusion.sampler import Sampler, ddpm_step, sample
from engines.diffusion.schedule import Schedule, learned_range_log_variance, make_schedule, posterior_mean, q_sample, respace

pytest.importorskip("diffusers", reason="the test extra brings diffusers, the independent reference")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # their use of NumPy 2

Name = Literal["linear", "cosine"]
SCHEDULES: tuple[Name, ...] = ("linear", "cosine")
THEIR_NAME = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
SHAPE = (3, 2, 4, 4)
TOLERANCE = 1e-5


def reference(kind: str, name: Name, **options: Any) -> Any:
    """A scheduler of diffusers over the same thousand training steps, its abar in float64.

    In float32, as it comes, 1 - abar loses four of its digits at small t, and theirs and ours lose different ones.
    """
    import diffusers

    scheduler = getattr(diffusers, kind)(num_train_timesteps=1000, beta_schedule=THEIR_NAME[name], **options)
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    return scheduler


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


def largest(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def analytic_eps(name: Name) -> Any:
    """The exact eps of Gaussian data N(0.3, 0.2 I), and a wave, so that it is not linear in x."""
    abars = torch.cumprod(1 - make_schedule(name, 1000).betas.double(), 0)

    def eps(x: Tensor, t: int) -> Tensor:
        abar = abars[t]
        x0 = 0.3 + abar.sqrt() * 0.2 / (abar * 0.2 + 1 - abar) * (x.double() - abar.sqrt() * 0.3)
        exact = (x.double() - abar.sqrt() * x0) / (1 - abar).sqrt()
        return (exact + 0.05 * abar * torch.sin(3 * x.double())).float()

    return eps


@pytest.mark.parametrize("name", SCHEDULES)
def test_betas_and_abar_are_theirs(name: Name) -> None:
    ours, theirs = make_schedule(name, 1000), reference("DDPMScheduler", name)
    assert largest(ours.betas, theirs.betas) < 1e-7
    assert largest(ours.alphas_cumprod, theirs.alphas_cumprod) < 1e-6


@pytest.mark.parametrize("name", SCHEDULES)
def test_q_sample_is_their_add_noise_at_every_timestep(name: Name) -> None:
    x0, noise, t = randn(0, 1000, 1, 2, 2), randn(1, 1000, 1, 2, 2), torch.arange(1000)
    assert largest(q_sample(make_schedule(name, 1000), x0, t, noise), reference("DDPMScheduler", name).add_noise(x0, noise, t)) < TOLERANCE


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("t", [1, 2, 300, 700, 998])
def test_the_posteriors_mean_and_its_variance_and_the_learned_range_are_theirs(name: Name, t: int) -> None:
    # Their step without its noise is the posterior's mean: x0 given as the prediction, not clipped; then the noise's factor.
    schedule, j = make_schedule(name, 1000), torch.full((3,), t)
    x0, x, values = randn(0), randn(1), randn(2)
    theirs = reference("DDPMScheduler", name, prediction_type="sample", clip_sample=False, variance_type="fixed_small")
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
    stepped = theirs.step(x0, t, x, generator=torch.Generator().manual_seed(9)).prev_sample
    ours = posterior_mean(schedule, x0, x, j) + schedule.posterior_variance[t].sqrt() * z
    assert largest(ours, stepped) < TOLERANCE
    learned = theirs._get_variance(t, values, "learned_range")
    assert largest(learned_range_log_variance(schedule, values, j), learned) < TOLERANCE


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("t", [1, 300, 700])
@pytest.mark.parametrize("clip", [False, True])
def test_a_ddpm_step_is_theirs(name: Name, learned: bool, t: int, clip: bool) -> None:
    schedule, j, x, values = make_schedule(name, 1000), torch.full((3,), t), randn(1), randn(2).clamp(-1, 1)
    eps = analytic_eps(name)(x, t)
    output = torch.cat([eps, values], 1) if learned else eps
    theirs = reference("DDPMScheduler", name, clip_sample=clip, variance_type="learned_range" if learned else "fixed_small")
    stepped = theirs.step(output, t, x, generator=torch.Generator().manual_seed(9)).prev_sample
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
    ours, _, _ = ddpm_step(schedule, x, j, output, torch.zeros_like(x), z, clip_denoised=clip)
    assert largest(ours, stepped) < TOLERANCE


def ours_and_theirs(name: Name, schedule: Schedule, theirs: Any, sampler: Sampler, clip: bool = False, eta: float = 0.0) -> float:
    """The largest difference over all states of a trajectory from the same noise with the same denoiser."""
    eps, noise = analytic_eps(name), [randn(step) for step in range(len(schedule) + 1)]
    seen: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return eps(x, int(t[0]))

    seen.append(sample(denoise, schedule, lambda step: noise[step], sampler=sampler, eta=eta, clip_denoised=clip))
    x, worst = noise[0], 0.0
    for step, t in enumerate(theirs.timesteps.tolist(), start=1):
        worst = max(worst, largest(seen[step - 1], x))
        options = {"eta": eta, "variance_noise": noise[step], "use_clipped_model_output": clip} if sampler == "ddim" else {}
        x = theirs.step(eps(x, t), t, x, **options).prev_sample
    return max(worst, largest(seen[-1], x.clamp(-1, 1) if clip else x))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [50, 250])
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("clip", [False, True])
def test_a_whole_ddim_trajectory_is_theirs(name: Name, steps: int, eta: float, clip: bool) -> None:
    # Same timesteps: "leading" spacing without offset is "ddimN". Same end: set_alpha_to_one. Where x0 is clipped, eps follows it:
    # use_clipped_model_output.
    theirs = reference("DDIMScheduler", name, timestep_spacing="leading", steps_offset=0, set_alpha_to_one=True, clip_sample=clip)
    theirs.set_timesteps(steps)
    schedule = respace(make_schedule(name, 1000), f"ddim{steps}")
    assert theirs.timesteps.tolist() == schedule.timesteps.flip(0).tolist()
    assert ours_and_theirs(name, schedule, theirs, "ddim", clip, eta) < TOLERANCE


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [10, 20, "ddim50", "10,15,25", 250])
def test_a_whole_dpm_solver_trajectory_is_theirs(name: Name, steps: int | str) -> None:
    # "dpmsolver++" of order 2 in its midpoint form is 2M; a last sigma of zero makes the last step one of first order to abar = 1.
    theirs = reference(
        "DPMSolverMultistepScheduler", name, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", final_sigmas_type="zero"
    )
    schedule = respace(make_schedule(name, 1000), steps)
    theirs.set_timesteps(timesteps=schedule.timesteps.flip(0).tolist())
    assert ours_and_theirs(name, schedule, theirs, "dpmpp_2m") < TOLERANCE
