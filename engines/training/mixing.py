"""Mixing images in pairs: mixup (Zhang et al. 2018) and Remix (Chou et al. 2020), which gives a mixed image to its rarer class.

All that is random about a step is drawn from a generator that the caller keys by (seed, step).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """How the images of a batch are mixed: x~_i = lam x_i + (1 - lam) x_j, j = partner[i]."""

    share: float  # lam, of the first image, in [0, 1]; one a batch
    partner: Tensor  # (B,) int64, a permutation of the batch

    def images(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same, mixed."""
        return self.share * x + (1.0 - self.share) * x[self.partner]


def draw_mixture(is_extra: Tensor, alpha: float, random: np.random.Generator) -> Mixture:
    """lam ~ Beta(alpha, alpha) and a random partner for each image, real ones among real and extra ones among extra.

    A mixture of a real and a synthetic image has no loss weight and no prior that is right for both, and on the digits it cost ten
    points (METHOD section 5).

    Args:
        is_extra: (B,) bool.
    """
    extra = is_extra.cpu().numpy()
    partner = np.arange(len(extra))
    for members in (np.flatnonzero(~extra), np.flatnonzero(extra)):
        partner[members] = random.permutation(members)
    return Mixture(float(random.beta(alpha, alpha)), torch.from_numpy(partner).to(is_extra.device))


def remix_shares(share: float, counts: Tensor, partner_counts: Tensor, kappa: float, tau: float) -> Tensor:
    """lam_y, the first image's share of the *label* (Chou et al. 2020): (B,).

        lam_y = 0    where N_i / N_j >= kappa    and  lam < tau        the label is the rarer partner's alone
        lam_y = 1    where N_i / N_j <= 1/kappa  and  1 - lam < tau    the label is the rarer first image's alone
        lam_y = lam  otherwise, as in mixup

    Args:
        share: lam, in [0, 1].
        counts, partner_counts: N_i and N_j, images of the two labels' classes, (B,), above 0.
    """
    shares = torch.full_like(counts, share)
    if share < tau:
        shares[counts >= kappa * partner_counts] = 0.0
    if 1.0 - share < tau:
        shares[kappa * counts <= partner_counts] = 1.0
    return shares
