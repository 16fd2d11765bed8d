"""The forward process and its posterior: Eqs. 1, 2 and 6, respacing, and the learned-range variance.

Tables are computed in float64 and kept in float32; they index by *position* j in 0..S-1, and `timesteps[j]` is the training
timestep t that the networks see. Without respacing j = t and S = T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from engines.diffusion.respacing import spaced_timesteps


@dataclass(frozen=True)
class Schedule:
    """Tables of a diffusion process of S steps, each (S,); abar_{-1} = 1."""

    timesteps: Tensor  # int64, training timestep of each position
    betas: Tensor
    alphas_cumprod: Tensor  # abar
    alphas_cumprod_prev: Tensor
    noise_variance: Tensor  # 1 - abar; in float32 the difference itself loses four digits at small t
    noise_variance_prev: Tensor
    posterior_variance: Tensor  # beta~ of q(x_{t-1} | x_t, x_0)
    posterior_log_variance_clipped: Tensor  # position 0 takes the value of position 1, where beta~ would be 0
    posterior_mean_coef1: Tensor  # of x_0
    posterior_mean_coef2: Tensor  # of x_t

    def __len__(self) -> int:
        return len(self.betas)

    def to(self, device: torch.device | str) -> Schedule:
        """The same tables on another device."""
        return Schedule(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def betas_of(noise_schedule: Literal["linear", "cosine"], steps: int) -> Tensor:
    """beta_t of Eq. 1, (steps,) float64.

    linear: 1e-4 .. 0.02 at T = 1000, scaled by 1000 / T for another T.
    cosine: abar(u) = cos^2((u + 0.008) / 1.008 * pi / 2), beta at most 0.999 (Nichol & Dhariwal 2021).
    """
    if noise_schedule == "linear":
        scale = 1000 / steps
        return torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64).clamp(max=0.999)
    edges = torch.arange(steps + 1, dtype=torch.float64) / steps
    abar = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


def make_schedule(noise_schedule: Literal["linear", "cosine"], steps: int) -> Schedule:
    """The training process: T = steps positions, position = timestep."""
    return _tables(betas_of(noise_schedule, steps), torch.arange(steps))


def respace(schedule: Schedule, steps: int | str) -> Schedule:
    """The process on so many timesteps of `schedule`: 250, "ddim50" or "10,15,25", see `spaced_timesteps`; betas keep abar at each.

    Raises ValueError where the schedule cannot give them.
    """
    return at_timesteps(schedule, spaced_timesteps(len(schedule), steps))


def at_timesteps(schedule: Schedule, positions: Sequence[int]) -> Schedule:
    """The process restricted to increasing positions: beta'_j = 1 - abar_{p_j} / abar_{p_{j-1}}."""
    kept = torch.as_tensor(positions)
    abar = torch.cumprod(1 - schedule.betas.double(), 0)[kept]
    previous = torch.cat([abar.new_ones(1), abar[:-1]])
    return _tables(1 - abar / previous, schedule.timesteps[kept])


def q_sample(schedule: Schedule, x0: Tensor, j: Tensor, noise: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) z, Eq. 2 (the paper prints alpha_t without the bar).

    Args:
        x0: (B, C, H, W) in [-1, 1].  j: (B,) int64 positions.  noise: (B, C, H, W) standard normal.
    """
    return at_positions(schedule.alphas_cumprod, j).sqrt() * x0 + at_positions(schedule.noise_variance, j).sqrt() * noise


def predict_x0(schedule: Schedule, x: Tensor, j: Tensor, eps: Tensor) -> Tensor:
    """x0~ = x_t / sqrt(abar_t) - sqrt(1 - abar_t) / sqrt(abar_t) z_theta, Eq. 6, in float32 whatever eps was computed in."""
    return (x.float() - at_positions(schedule.noise_variance, j).sqrt() * eps.float()) / at_positions(schedule.alphas_cumprod, j).sqrt()


def predict_eps(schedule: Schedule, x: Tensor, j: Tensor, x0: Tensor) -> Tensor:
    """z of Eq. 2, the inverse of `predict_x0`."""
    return (x - at_positions(schedule.alphas_cumprod, j).sqrt() * x0) / at_positions(schedule.noise_variance, j).sqrt()


def posterior_mean(schedule: Schedule, x0: Tensor, x: Tensor, j: Tensor) -> Tensor:
    """Mean of q(x_{t-1} | x_t, x_0), (B, C, H, W)."""
    return at_positions(schedule.posterior_mean_coef1, j) * x0 + at_positions(schedule.posterior_mean_coef2, j) * x


def learned_range_log_variance(schedule: Schedule, values: Tensor, j: Tensor) -> Tensor:
    """log Sigma between the posterior's and beta_t: v in [-1, 1] interpolates their logarithms (Nichol & Dhariwal 2021).

    Args:
        values: (B, C, H, W), the second half of the network's output.
    """
    low = at_positions(schedule.posterior_log_variance_clipped, j)
    high = at_positions(schedule.betas, j).log()
    fraction = (values.float() + 1) / 2
    return fraction * high + (1 - fraction) * low


def at_positions(table: Tensor, j: Tensor) -> Tensor:
    """A table's values at j (B,), as (B, 1, 1, 1)."""
    return table[j].view(-1, 1, 1, 1)


def _tables(betas: Tensor, timesteps: Tensor) -> Schedule:
    abar = torch.cumprod(1 - betas, 0)
    previous = torch.cat([abar.new_ones(1), abar[:-1]])
    variance = betas * (1 - previous) / (1 - abar)
    clipped = torch.cat([variance[1:2], variance[1:]]) if len(variance) > 1 else betas
    return Schedule(
        timesteps=timesteps,
        betas=betas.float(),
        alphas_cumprod=abar.float(),
        alphas_cumprod_prev=previous.float(),
        noise_variance=(1 - abar).float(),
        noise_variance_prev=(1 - previous).float(),
        posterior_variance=variance.float(),
        posterior_log_variance_clipped=clipped.log().float(),
        posterior_mean_coef1=(betas * previous.sqrt() / (1 - abar)).float(),
        posterior_mean_coef2=((1 - previous) * (1 - betas).sqrt() / (1 - abar)).float(),
    )
