"""Guided samplers: ancestral DDPM (the paper's, Eq. 13) and DDIM. A sampler knows an engine, a guidance and noise, no files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from engines.diffusion.guidance import Guidance, Push
from engines.diffusion.schedule import Schedule, learned_range_log_variance, posterior_mean, predict_eps, predict_x0


class Denoiser(Protocol):
    """What a sampler calls: an engine, or any function of (x, t, y) with y bound."""

    def __call__(self, x: Tensor, t: Tensor) -> Tensor: ...


class StepLog(NamedTuple):
    """Figures of one step, means over the batch; guidance figures are 0 where guidance is off."""

    t: int
    guidance_to_noise: float  # ||guidance|| / ||noise||, both as they enter x_{t-1}
    scale: float
    log_prob: float


Sampler = Literal["ddpm", "ddim", "dpmpp_2m"]

Noise = Callable[[int], Tensor]
"""step -> (B, C, H, W) standard normal; step 0 is x_T, step i >= 1 the noise of the i-th evaluation."""


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
) -> Tensor:
    """Run the reverse process of `schedule` from x_T = noise(0).

    ddpm, Eq. 13:  x_{t-1} = mu + sigma_t z + s sigma_t grad*   (the paper prints `Sigma z`, and Sigma before grad* too;
                   `step_unit="variance"` is that reading)
    ddim:          eps <- eps - sqrt(1 - abar_t) s grad*, then the step of Song et al. 2021 with its eta

    Args:
        denoise: (B, C, H, W), (B,) training timesteps -> (B, C, H, W) eps, or (B, 2C, H, W) eps and variance values.

    Returns: (B, C, H, W) float32, in [-1, 1] where clip_denoised.
    """
    assert sampler != "dpmpp_2m", "not written yet"
    x = noise(0)  # (B, C, H, W)
    batch, channels = x.shape[:2]
    for step, position in enumerate(reversed(range(len(schedule))), start=1):
        j = torch.full((batch,), position, device=x.device)
        t = schedule.timesteps[j]
        output = denoise(x, t).float()
        eps = output[:, :channels]
        push = guidance(x, t) if guidance else None
        if sampler == "ddpm":
            x0 = predict_x0(schedule, x, j, eps)
            mean = posterior_mean(schedule, x0.clamp(-1, 1) if clip_denoised else x0, x, j)
            if output.shape[1] == 2 * channels:
                variance = learned_range_log_variance(schedule, output[:, channels:], j).exp()
            else:
                variance = schedule.posterior_log_variance_clipped[j].exp().view(-1, 1, 1, 1)
            sigma = variance.sqrt()
            random = sigma * noise(step) if position else torch.zeros_like(x)  # the last step adds none
            guided = (sigma if step_unit == "sigma" else variance) * push.gradient if push else torch.zeros_like(x)
            x = mean + random + guided
        else:
            abar = schedule.alphas_cumprod[j].view(-1, 1, 1, 1)
            previous = schedule.alphas_cumprod_prev[j].view(-1, 1, 1, 1)
            guided = -(1 - abar).sqrt() * push.gradient if push else torch.zeros_like(x)
            x0 = predict_x0(schedule, x, j, eps + guided)
            if clip_denoised:
                x0 = x0.clamp(-1, 1)
            eps = predict_eps(schedule, x, j, x0)
            sigma = eta * ((1 - previous) / (1 - abar) * (1 - abar / previous)).sqrt()
            random = sigma * noise(step) if position and eta else torch.zeros_like(x)
            x = previous.sqrt() * x0 + (1 - previous - sigma**2).clamp(min=0).sqrt() * eps + random
        if log:
            log(_figures(int(schedule.timesteps[position]), random if sampler == "ddpm" else eps, guided, push))
    return x.clamp(-1, 1) if clip_denoised else x


def _figures(t: int, random: Tensor, guided: Tensor, push: Push | None) -> StepLog:
    if push is None:
        return StepLog(t, 0.0, 0.0, 0.0)
    size = random.flatten(1).norm(dim=1)
    ratio = guided.flatten(1).norm(dim=1) / size.clamp(min=1e-12)
    return StepLog(
        t, float(ratio[size > 0].mean()) if bool((size > 0).any()) else 0.0, float(push.scale.mean()), float(push.log_prob.mean())
    )
