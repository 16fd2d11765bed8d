"""The prototype guide: f(x_t, t) on the unit sphere and one prototype a class, Eqs. 11-12."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.diffusion.losses import prototype_log_probs
from engines.networks.unet import Architecture, Encoder


class Guide(nn.Module):
    """A small time-conditioned encoder, projected to unit vectors, and unit prototypes that no gradient reaches.

    Args:
        class_counts: (K,) N_k of the training set.
        embedding_dim: D.
        class_prior: whether the pi_k of Eq. 12 take part; without them every class counts alike.
    """

    prototypes: Tensor
    log_prior: Tensor

    def __init__(
        self, architecture: Architecture, class_counts: Tensor, embedding_dim: int = 128, tau: float = 0.07, class_prior: bool = True
    ) -> None:
        super().__init__()
        self.encoder = Encoder(architecture, embedding_dim)
        self.tau = tau
        prior = class_counts.float() / class_counts.sum() if class_prior else torch.full((len(class_counts),), 1 / len(class_counts))
        self.register_buffer("log_prior", prior.log())
        self.register_buffer("prototypes", F.normalize(torch.ones(len(class_counts), embedding_dim), dim=-1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """f(x_t, t): x (B, C, H, W), t (B,) training timesteps -> (B, D) unit vectors."""
        return F.normalize(self.encoder(x, t), dim=-1)

    def log_probs(self, x: Tensor, t: Tensor) -> Tensor:
        """log p~(k | x_t), (B, K), Eq. 12 without the minus."""
        return prototype_log_probs(self(x, t), self.prototypes, self.log_prior, self.tau)
