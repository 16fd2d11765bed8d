"""The losses of the method: Eq. 3 with its variational term, the pair-wise diversity loss (7-9), prototypes and L_PC (11-12)."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.diffusion.schedule import Schedule, learned_range_log_variance, posterior_mean, predict_x0


def base_loss(noise: Tensor, eps: Tensor) -> Tensor:
    """L_base = mean (z - z_theta(x_t, t))^2 of each image, Eqs. 3 and 5.

    Args:
        noise: (B, C, H, W) z.  eps: (B, C, H, W) the network's estimate of it.

    Returns: (B,).
    """
    return (noise - eps.float()).square().flatten(1).mean(1)


def variational_loss(schedule: Schedule, x0: Tensor, x: Tensor, j: Tensor, eps: Tensor, values: Tensor) -> Tensor:
    """One term of L_vlb, in bits per value: KL(q(x_{t-1} | x_t, x_0) || p_theta), or -log p_theta(x_0 | x_1) at the first step.

    It trains the variance alone: the gradient of the mean is stopped (Nichol & Dhariwal 2021). L_vlb is the sum of the terms
    over t, so T times this value of a random t estimates it.

    Args:
        x0, x, eps, values: (B, C, H, W); values are the network's second half.  j: (B,) positions.

    Returns: (B,).
    """
    mean = posterior_mean(schedule, predict_x0(schedule, x, j, eps.detach()), x, j)
    log_variance = learned_range_log_variance(schedule, values, j)
    true_mean = posterior_mean(schedule, x0, x, j)
    true_log_variance = schedule.posterior_log_variance_clipped[j].view(-1, 1, 1, 1)
    kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
    nll = -discretized_log_likelihood(x0, mean, log_variance / 2)
    first = (j == 0).view(-1, 1, 1, 1)
    return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) of independent normal values, elementwise, nats."""
    spread = (log_variance1 - log_variance2).exp() + (mean1 - mean2).square() * (-log_variance2).exp()
    return 0.5 * (log_variance2 - log_variance1 - 1 + spread)


def discretized_log_likelihood(x0: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log probability, elementwise in nats, of the 8-bit bin around x0 in [-1, 1] under a normal; the end bins are open."""
    inverse_std = (-log_std).exp()
    upper = torch.special.ndtr((x0 + 1 / 255 - mean) * inverse_std)
    lower = torch.special.ndtr((x0 - 1 / 255 - mean) * inverse_std)
    upper = torch.where(x0 > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x0 < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=1e-12).log()


def neighbor_log_probs(x0: Tensor, temperature: Tensor | float) -> Tensor:
    """log softmax over j != i of s(i, j) / temperature; s is the cosine similarity of flattened images, Eqs. 7 and 8.

    In float32 whatever the autocast: similarities near 1 differ by less than bfloat16 can tell, and the row would be flat.

    Args:
        x0: (G, M, C, H, W) groups of M images of one class, M >= 3: a row of one entry is constant.
        temperature: scalar, or (G,).

    Returns: (G, M, M - 1), row i without its own column, columns in order.
    """
    groups, m = x0.shape[:2]
    assert m >= 3, "with two images a row of Eq. 7 has one entry and its loss is identically 0"
    with torch.autocast(x0.device.type, enabled=False):
        directions = F.normalize(x0.float().flatten(2), dim=-1)  # (G, M, D)
        similarity = directions @ directions.transpose(1, 2)  # (G, M, M)
    others = ~torch.eye(m, dtype=torch.bool, device=x0.device)
    rows = similarity[:, others].view(groups, m, m - 1)
    return F.log_softmax(rows / torch.as_tensor(temperature, device=x0.device).view(-1, 1, 1), dim=-1)


def pair_diversity_loss(
    x0_source: Tensor,
    x0_target: Tensor,
    class_counts: Tensor,
    gamma: float = 0.1,
    direction: Literal["tar||sou", "sou||tar"] = "tar||sou",
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pair-wise diversity loss, Eqs. 7-9.

        p_sou[i] = softmax over j != i of  s(i, j)                         (7)
        p_tar[i] = softmax over j != i of  s(i, j) / (1 + gamma * N_k)     (8)
        loss     = sum over i of  KL(p_tar[i] || p_sou[i])                 (9)

    Eq. 8 scales one side only, so equal models do not give zero; that is intended. Other work has the KL the other way round
    (`direction`).

    Args:
        x0_source: (G, M, C, H, W) predictions of the frozen source model, Eq. 6; each group of M >= 3 images is of one class.
        x0_target: (G, M, C, H, W) the same images and noise, predicted by the target model.
        class_counts: (G,) N_k, each class's images in the training set (not M).
        temperature: extra divisor of both rows.

    Returns: loss (G,) in nats, summed over the M images; mean entropy (G,) of the source rows and of the target rows.
    """
    log_p_sou = neighbor_log_probs(x0_source.detach(), temperature)  # (G, M, M-1)
    log_p_tar = neighbor_log_probs(x0_target, temperature * (1 + gamma * class_counts.float()))  # (G, M, M-1)
    if direction == "tar||sou":
        kl = (log_p_tar.exp() * (log_p_tar - log_p_sou)).sum((1, 2))
    else:
        kl = (log_p_sou.exp() * (log_p_sou - log_p_tar)).sum((1, 2))
    return kl, entropy(log_p_sou).mean(1), entropy(log_p_tar.detach()).mean(1)


def entropy(log_probs: Tensor) -> Tensor:
    """-sum p log p over the last dimension, nats."""
    return -(log_probs.exp() * log_probs).sum(-1)


def prototype_log_probs(features: Tensor, prototypes: Tensor, log_prior: Tensor, tau: float = 0.07) -> Tensor:
    """log p~(k | x_t) = log [ pi_k exp(f . c_k / tau) / sum_j pi_j exp(f . c_j / tau) ], (B, K); Eq. 12 without the minus.

    In float32 whatever the autocast: 1 / tau enlarges a rounded cosine fourteen times.

    Args:
        features: (B, D) unit vectors.  prototypes: (K, D) unit vectors, detached.  log_prior: (K,) log pi_k, or zeros.
    """
    with torch.autocast(features.device.type, enabled=False):
        cosines = features.float() @ prototypes.t()  # (B, K)
    return F.log_softmax(cosines / tau + log_prior, dim=-1)


def prototype_contrastive_loss(features: Tensor, labels: Tensor, prototypes: Tensor, log_prior: Tensor, tau: float = 0.07) -> Tensor:
    """L_PC of each image, Eq. 12 (the paper prints c^i for c^k), (B,) nats. labels: (B,) int64."""
    return F.nll_loss(prototype_log_probs(features, prototypes.detach(), log_prior, tau), labels, reduction="none")


def update_prototypes(prototypes: Tensor, features: Tensor, labels: Tensor, momentum: float = 0.999) -> Tensor:
    """c_k <- m c_k + (1 - m) f for each image in order, then every c_k to unit length, Eq. 11; (K, D).

    The paper omits the normalization of MoPro, on which it builds. n images of one class in a batch are the closed form of n
    single updates: c <- m^n c + (1 - m) sum_i m^(n - 1 - i) f_i.
    """
    classes = F.one_hot(labels, len(prototypes)).to(features.dtype)  # (B, K)
    later = classes.sum(0) - classes.cumsum(0)  # (B, K) images of class k that come after image i
    weights = classes * (1 - momentum) * momentum**later
    kept = momentum ** classes.sum(0)
    return F.normalize(kept[:, None] * prototypes + weights.t() @ features, dim=-1)
