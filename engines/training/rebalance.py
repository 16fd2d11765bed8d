"""Losses that answer a long tail: priors, class weights, margins and label smoothing as functions of the class counts N_k.

Every one of them is cross-entropy with something added to the logits or multiplied into an image's weight, so one loss serves all.
A class without images (N_k = 0) cannot occur: its log-prior is -inf, its weight and margin are 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.recipe import Method, RecognizerSection


@dataclass(frozen=True)
class Rebalancing:
    """What a method does to the images of each class: row 0 for a real image, row 1 for an extra one; each (2, K)."""

    log_prior: Tensor  # added to the logits; 0 = nothing
    class_weight: Tensor  # times the image's loss weight; 1 = nothing
    margin: Tensor  # LDAM's, in cosines; 0 = none
    smoothing: Tensor  # MiSLAS's eps; 0 = none
    counts: Tensor  # N_k as Remix compares them; alike = mixup

    def to(self, device: torch.device) -> Rebalancing:
        return Rebalancing(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def rebalancing(real: Tensor, together: Tensor, section: RecognizerSection, method: Method, own_law: bool, late: bool) -> Rebalancing:
    """The tables of a method.

    Args:
        real, together: images of each class, (K,), counted by their loss weights: real ones, and real and extra ones.
        own_law: `synthetic_prior`, or the last phase on real images. Each source keeps its own law: the real counts rule real images,
            and extra ones are trained on as cross-entropy does. They fill what is rare, so they must not undo the real ones' rule.
            Else the counts of both together rule all images.
        late: whether LDAM's deferred weights have begun.
    """
    counts = real if own_law else together

    def both(of_real: Tensor, neutral: float) -> Tensor:
        return torch.stack([of_real, torch.full_like(of_real, neutral) if own_law else of_real])

    ones, zeros = torch.ones_like(counts), torch.zeros_like(counts)
    prior, weight, margin, smoothing = zeros, ones, zeros, zeros
    if method == "balanced_softmax":
        prior = log_prior(counts)
    elif method == "logit_adjustment":
        prior = log_prior(counts, section.logit_adjustment_tau)
    elif method == "class_balanced":
        weight = effective_number_weights(counts, section.class_balanced_beta)
    elif method == "ldam_drw":
        margin = ldam_margins(counts, section.ldam_max_margin)
        weight = effective_number_weights(counts, section.ldam_drw_beta) if late else ones
    elif method == "mislas":
        smoothing = smoothing_factors(counts, section.mislas_smoothing_head, section.mislas_smoothing_tail)
    return Rebalancing(both(prior, 0.0), both(weight, 1.0), both(margin, 0.0), both(smoothing, 0.0), both(counts, 1.0))


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, log_prior: Tensor) -> Tensor:
    """Cross-entropy under a prior, one weight an image.

        L = sum over i of  w_i * -log softmax(z_i + log_prior_i)[y_i]  /  sum over i of w_i

    With log_prior = 0 this is cross-entropy. With log_prior = log pi it is balanced softmax (Ren et al. 2020),

        -log( N_y exp z_y / sum_k N_k exp z_k ),

    whose prior is part of the loss and not of the network: z alone predicts as if the classes were balanced.

    Args:
        logits: z, (B, K) float32.
        labels: y, (B,) int64.
        weights: w, (B,), not all 0; class weights are multiplied into them.
        log_prior: (B, K) or (K,); -inf where a class cannot occur.

    Returns: scalar, nats.
    """
    losses = F.cross_entropy(logits + log_prior, labels, reduction="none")  # (B,)
    return (weights * losses).sum() / weights.sum()


def class_counts(labels: Tensor, weights: Tensor, classes: int) -> Tensor:
    """N_k, (K,) float32: images a class, each counted by its weight (B,)."""
    return torch.zeros(classes).index_add(0, labels, weights)


def log_prior(counts: Tensor, tau: float = 1.0) -> Tensor:
    """tau log pi_k with pi_k = N_k / N, (K,) -> (K,): logit adjustment in training (Menon et al. 2021).

    At tau = 1 it is balanced softmax; the same prior subtracted after training would be the paper's other, post-hoc way.
    """
    return tau * (counts / counts.sum()).log()


def effective_number_weights(counts: Tensor, beta: float) -> Tensor:
    """Class weights (1 - beta) / (1 - beta^N_k), scaled to sum to the number of classes (Cui et al. 2019): (K,) -> (K,).

    E_k = (1 - beta^N_k) / (1 - beta) is the "effective number" of N_k images. beta = 0 weighs all classes alike, beta -> 1 as 1 / N_k.
    """
    effective = -torch.expm1(counts.double() * math.log(beta)) if beta else (counts > 0).double()  # E_k (1 - beta)
    weights = torch.where(counts > 0, 1.0 / effective.clamp(min=1e-300), 0.0)
    return (weights * (counts > 0).sum() / weights.sum()).float()


def ldam_margins(counts: Tensor, largest: float) -> Tensor:
    """m_k = C / N_k^(1/4), C such that the rarest class has margin `largest` (Cao et al. 2019): (K,) -> (K,)."""
    margins = torch.where(counts > 0, counts.clamp(min=1e-12) ** -0.25, 0.0)
    return margins * (largest / margins.max())


def margin_offsets(labels: Tensor, margins: Tensor, scale: float, classes: int) -> Tensor:
    """What LDAM adds to the logits z = scale * cos(w_k, f), as a "prior" of `weighted_cross_entropy` (Cao et al. 2019).

        L = -log( exp(s (cos_y - m_y)) / (exp(s (cos_y - m_y)) + sum over k != y of exp(s cos_k)) )

    Args:
        labels: y, (B,).
        margins: m_y of each image, (B,).

    Returns: (B, K), -scale * m_y at k = y, 0 elsewhere.
    """
    return F.one_hot(labels, classes) * (-scale * margins)[:, None]


def smoothing_factors(counts: Tensor, head: float, tail: float) -> Tensor:
    """Label-aware smoothing, eps_k of each class (Zhong et al. 2021, MiSLAS): (K,) -> (K,) in [0, 1].

        eps_k = eps_K + (eps_1 - eps_K) sin( pi (N_k - N_K) / (2 (N_1 - N_K)) )

    with N_1 and N_K the largest and the smallest count: a common class, of which the network is too sure, is smoothed by eps_1 =
    `head`, the rarest by eps_K = `tail`. Where all counts are equal, so are all eps_k = `tail`.
    """
    present = counts[counts > 0]
    above = (counts - present.min()).clamp(min=0) / (present.max() - present.min()).clamp(min=1e-12)  # (K,) in [0, 1]
    return tail + (head - tail) * torch.sin(above * (math.pi / 2))


def smoothed_targets(labels: Tensor, factors: Tensor, classes: int) -> Tensor:
    """(1 - eps) onehot_y + eps / K: labels (B,), eps of each image (B,) -> (B, K), every row sums to 1."""
    return F.one_hot(labels, classes) * (1.0 - factors)[:, None] + (factors / classes)[:, None]


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """mean over i of -sum_k q_ik log softmax(z_i)_k: logits z and targets q, (B, K) each -> scalar, nats."""
    return F.cross_entropy(logits, targets)
