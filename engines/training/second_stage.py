"""Second stages on a trained backbone (Kang et al. 2020, Zhong et al. 2021): new or rescaled classifiers, balanced draws, tau-norm.

The first stage learns features from the images as they come; here the linear classifier z = W f + b alone is mended.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TAUS = tuple(n / 10 for n in range(21))  # of tau-normalization: 0, 0.1 .. 2 (Kang et al. 2020)


class ScaledLinear(nn.Linear):
    """z_k = s_k (w_k . f + b_k) with one learned scale a class (LWS), s = 1 at first: (B, D) -> (B, K)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        self.scale = nn.Parameter(torch.ones(linear.out_features))

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.linear(features, self.weight, self.bias)

    def folded(self) -> nn.Linear:
        """The plain linear layer that gives the same logits."""
        linear = nn.Linear(self.in_features, self.out_features)
        scale = self.scale.detach()
        linear.load_state_dict({"weight": scale[:, None] * self.weight.detach(), "bias": scale * self.bias.detach()})
        return linear.to(scale.device)


def fresh_classifier(linear: nn.Linear, generator: torch.Generator) -> nn.Linear:
    """A classifier of the same shape that has learned nothing (cRT)."""
    fresh = nn.Linear(linear.in_features, linear.out_features)
    nn.init.kaiming_normal_(fresh.weight, generator=generator)
    nn.init.zeros_(fresh.bias)
    return fresh


def tau_normalized(linear: nn.Linear, tau: float) -> nn.Linear:
    """w_k / ||w_k||^tau (Kang et al. 2020): common classes have longer rows, and lose that advantage as tau goes from 0 to 1.

    b_k is divided likewise, as the weight of a feature that is always 1, where the paper drops it: so tau = 0 changes nothing.
    """
    divisor = linear.weight.detach().norm(dim=1).clamp(min=1e-12) ** tau  # (K,)
    normalized = nn.Linear(linear.in_features, linear.out_features)
    normalized.load_state_dict({"weight": linear.weight.detach() / divisor[:, None], "bias": linear.bias.detach() / divisor})
    return normalized.to(linear.weight.device)


@torch.no_grad()
def best_tau(linear: nn.Linear, features: Tensor, labels: Tensor) -> float:
    """The tau of `TAUS` with the best mean accuracy over classes on held-out training images; of equals the middle one.

    Few images leave many taus equal, and the middle is farthest from where they begin to fail; without any, it is tau = 1.

    Args:
        features: (N, D) of images that the network was not trained on, and that are no test images.
        labels: (N,); N = 0 gives 1, which makes all rows equally long.
    """
    weights = 1.0 / torch.bincount(labels, minlength=linear.out_features)[labels].double()  # (N,), a class sums to 1
    scores = [float(weights[tau_normalized(linear, tau)(features).argmax(1) == labels].sum()) for tau in TAUS]
    best = np.flatnonzero(np.isclose(scores, max(scores)))
    return TAUS[int(best[len(best) // 2])]


def balanced_indices(
    labels: npt.NDArray[np.int64], weights: npt.NDArray[np.float32], batch_size: int, random: np.random.Generator
) -> npt.NDArray[np.int64]:
    """(batch_size,) indices, with replacement: every class that has images equally often, within it an image as often as its weight says.

    Args:
        labels: (N,).
        weights: (N,), above 0.
    """
    order = np.argsort(labels, kind="stable")
    _, rank, counts = np.unique(labels[order], return_inverse=True, return_counts=True)
    mass = np.bincount(rank, weights[order])  # (classes present,)
    ends = np.cumsum(weights[order] / mass[rank])  # class after class, each of mass 1
    drawn = np.searchsorted(ends, random.random(batch_size) * len(counts), side="right")
    return np.asarray(order[drawn.clip(max=len(order) - 1)], dtype=np.int64)
