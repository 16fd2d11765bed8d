"""Samplers: ancestral DDPM (the paper's, Eq. 13), DDIM and DPM-Solver++(2M). They know a denoiser, a guidance and noise, no files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from engines.diffusion.schedule import Schedule, at_positions, learned_range_log_variance, posterior_mean, predict_eps, predict_x0

Sampler = Literal["ddpm", "ddim", "dpmpp_2m"]


class Denoiser(Protocol):
    """What a sampler calls: an engine, or any function of (x, t, y) with y bound."""

    def __call__(self, x: Tensor, t: Tensor) -> Tensor: ...


class Push(NamedTuple):
    """What guidance asks of a sampler."""

    gradient: Tensor  # (B, C, H, W) s grad*, signed: toward or away
    log_prob: Tensor  # (B,) log p(y | x_t)
    scale: Tensor  # (B,) s


Guidance = Callable[[Tensor, Tensor], Push | None]
"""(x, t) -> the push, or None where guidance is off. Not by the value of t, which would wait for the device: see `sample`'s interval."""


class Stepped(NamedTuple):
    """A whole guided step, and its figures image by image."""

    x: Tensor  # (B, C, H, W) x_{t-1}
    guidance_to_noise: Tensor  # (B,), see `StepLog`
    scale: Tensor  # (B,) s
    log_prob: Tensor  # (B,) log p(y | x_t)


GuidedStep = Callable[[Tensor, Tensor, Tensor], Stepped | None]
"""(x, positions j (B,), z) -> one step of ddpm or ddim with its guidance, or None where it leaves the step to the sampler."""

Noise = Callable[[int], Tensor]
"""step -> (B, C, H, W) standard normal; step 0 is x_T (or what stands in its place), step i >= 1 the noise of the i-th evaluation."""

EVERYWHERE = (0, 10**9)


class StepLog(NamedTuple):
    """Figures of one step, means over the batch, 0 where guidance is off.

    Scalars on the sampler's device: read them after the last step, since reading one waits for the device.
    The ratio of ddpm is that of the two terms of Eq. 13, 0 at the last step, which adds no noise; the others' is that of
    sqrt(1 - abar_t) s grad* to the eps from which it is subtracted.
    """

    t: int
    guidance_to_noise: Tensor  # ||guidance|| / ||noise||
    scale: Tensor
    log_prob: Tensor


def sample(
    denoise: Denoiser,
    schedule: Schedule,
    noise: Noise,
    guidance: Guidance | None = None,
    sampler: Sampler = "ddpm",
    eta: float = 0.0,
    step_unit: Literal["sigma", "variance"] = "sigma",
    clip_denoised: bool = True,
    log: Callable[[StepLog], None] | None = None,
    guided_step: GuidedStep | None = None,
    interval: tuple[int, int] = EVERYWHERE,
    plain: Denoiser | None = None,
) -> Tensor:
    """Run the reverse process of `schedule` from x_T = noise(0).

        ddpm            x_{t-1} = mu + sigma_t z + s sigma_t grad*: `ddpm_step`
        ddim, dpmpp_2m  eps <- eps - sqrt(1 - abar_t) s grad*, then `ddim_step` or `dpmpp_2m_step`

    Args:
        denoise: (B, C, H, W), (B,) training timesteps -> (B, C, H, W) eps, or (B, 2C, H, W) eps and variance values.
        eta: of ddim.  step_unit: of ddpm.
        log: called after each step, so that it can stop the run by raising.
        guided_step: an engine that makes steps of ddpm or ddim whole; asked first, `denoise` and `guidance` only where it gives None.
        interval: training timesteps (first, last) in which guidance acts; outside, neither `guidance` nor `guided_step` is asked.
        plain: what takes the place of a `denoise` that guides by itself outside the interval.

    Nothing in a step reads a value of a tensor, so that a device can be given the next step before it has done the last.

    Returns: (B, C, H, W) float32, in [-1, 1] where clip_denoised.
    """
    x = noise(0)  # (B, C, H, W)
    channels, timesteps, x0_before = x.shape[1], schedule.timesteps.tolist(), None
    assert guided_step is None or sampler != "dpmpp_2m", "a step that remembers the one before is not fused"
    draws = sampler == "ddpm" or (sampler == "ddim" and eta > 0)
    for step, position in enumerate(reversed(range(len(schedule))), start=1):
        j = torch.full((len(x),), position, device=x.device)
        t = schedule.timesteps[j]
        z = noise(step) if draws and position else torch.zeros_like(x)  # the last step adds none
        guided_here = within(interval, timesteps[position])
        stepped = guided_step(x, j, z) if guided_step and guided_here else None
        if stepped:
            x = stepped.x
            if log:
                log(StepLog(timesteps[position], *(figure.mean() for figure in stepped[1:])))
            continue
        output = (denoise if guided_here or not plain else plain)(x, t).float()
        push = guidance(x, t) if guidance and guided_here else None
        gradient = push.gradient if push else torch.zeros_like(x)
        if sampler == "ddpm":
            x, guided, random = ddpm_step(schedule, x, j, output, gradient, z, step_unit, clip_denoised)
        else:
            random = output[:, :channels]  # eps
            guided = -at_positions(schedule.noise_variance, j).sqrt() * gradient
            x0 = clipped(predict_x0(schedule, x, j, random + guided), clip_denoised)
            if sampler == "ddim":
                x = ddim_step(schedule, x, j, x0, z, eta)
            else:
                x = dpmpp_2m_step(schedule, x, j, x0, x0_before if position else None)
            x0_before = x0
        if log:
            log(_figures(timesteps[position], guided, random, push))
    return clipped(x, clip_denoised)


def within(interval: tuple[int, int], t: int) -> bool:
    """Whether guidance acts at a training timestep."""
    return interval[0] <= t <= interval[1]


def ddpm_step(
    schedule: Schedule,
    x: Tensor,
    j: Tensor,
    output: Tensor,
    gradient: Tensor,
    z: Tensor,
    step_unit: Literal["sigma", "variance"] = "sigma",
    clip_denoised: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 13: x_{t-1} = mu + sigma_t z + s sigma_t grad*, with mu from the x0 that the network predicts, and its variance or beta~.

    The paper prints `Sigma z`, and Sigma before grad* too; with `step_unit="variance"` it stands before grad*, which is Eq. 4.

    Args:
        output: (B, C, H, W), or (B, 2C, H, W) with the variance values.  gradient: (B, C, H, W) s grad*.

    Returns: x_{t-1}, and the two terms beside mu: the guidance and the noise; (B, C, H, W) each.
    """
    channels = x.shape[1]
    x0 = clipped(predict_x0(schedule, x, j, output[:, :channels]), clip_denoised)
    if output.shape[1] == 2 * channels:
        variance = learned_range_log_variance(schedule, output[:, channels:], j).exp()
    else:
        variance = at_positions(schedule.posterior_log_variance_clipped, j).exp()
    sigma = variance.sqrt()
    guided = (sigma if step_unit == "sigma" else variance) * gradient
    random = sigma * z
    return posterior_mean(schedule, x0, x, j) + random + guided, guided, random


def ddim_step(schedule: Schedule, x: Tensor, j: Tensor, x0: Tensor, z: Tensor, eta: float = 0.0) -> Tensor:
    """x_{t-1} = sqrt(abar_{t-1}) x0 + sqrt(1 - abar_{t-1} - sigma^2) eps + sigma z,  sigma^2 = eta^2 beta~  (Song et al. 2021).

    eps is what x_t holds beside x0, so it follows where x0 was clipped.
    """
    previous = at_positions(schedule.alphas_cumprod_prev, j)
    variance = eta**2 * at_positions(schedule.posterior_variance, j)
    eps = predict_eps(schedule, x, j, x0)
    left = (at_positions(schedule.noise_variance_prev, j) - variance).clamp(min=0)  # rounding, where eta = 1 and abar falls steeply
    return previous.sqrt() * x0 + left.sqrt() * eps + variance.sqrt() * z


def dpmpp_2m_step(schedule: Schedule, x: Tensor, j: Tensor, x0: Tensor, x0_before: Tensor | None) -> Tensor:
    """DPM-Solver++(2M), data prediction (Lu et al. 2022): the step of DDIM to x0 carried on along its change since the last step.

        D = x0 + (x0 - x0_before) / (2 r),   r = (lambda_t - lambda_{t+1}) / (lambda_{t-1} - lambda_t)

    They write (sigma_{t-1} / sigma_t) x_t - alpha_{t-1} (exp(-h) - 1) D with h = lambda_{t-1} - lambda_t, which is the step of DDIM
    with D for x0, since exp(-h) = alpha_t sigma_{t-1} / (sigma_t alpha_{t-1}).

    Args:
        x0_before: of the step before, or None for a step of first order, which is DDIM's. So are the first one, which has no past, and
            the last one, which goes to abar = 1, where lambda is infinite: it returns x0.
    """
    no_noise = torch.zeros_like(x)
    if x0_before is None:
        return ddim_step(schedule, x, j, x0, no_noise)
    snr = schedule.alphas_cumprod / schedule.noise_variance
    before, now = (at_positions(snr, at).log() for at in (j + 1, j))
    after = (at_positions(schedule.alphas_cumprod_prev, j) / at_positions(schedule.noise_variance_prev, j)).log()
    r = (now - before) / (after - now)  # of logarithms that are 2 lambda
    return ddim_step(schedule, x, j, x0 + (x0 - x0_before) / (2 * r), no_noise)


def clipped(x0: Tensor, clip_denoised: bool) -> Tensor:
    """Static thresholding: what is predicted lies in [-1, 1], as images do."""
    return x0.clamp(-1, 1) if clip_denoised else x0


def guidance_to_noise(guided: Tensor, random: Tensor) -> Tensor:
    """||guided|| / ||random|| of each image, (B,); 0 where there is no noise."""
    noise = random.flatten(1).norm(dim=1)
    return torch.where(noise > 0, guided.flatten(1).norm(dim=1) / noise.clamp(min=1e-12), 0.0)


def _figures(t: int, guided: Tensor, random: Tensor, push: Push | None) -> StepLog:
    if push is None:
        return StepLog(t, *torch.zeros(3, device=guided.device).unbind())
    return StepLog(t, guidance_to_noise(guided, random).mean(), push.scale.mean(), push.log_prob.mean())
