"""Guidance as wrappers that no sampler knows of: by a classifier's gradient, Eqs. 4 and 13, or free of a classifier."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from engines.diffusion.losses import entropy
from engines.diffusion.sampler import Denoiser, Guidance, Push

LogProbs = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, H, W), t (B,) training timesteps) -> (B, K) log p(k | x_t), differentiable in x."""

ClassGradient = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x, t, y) -> what `class_gradient` gives for a guide, from wherever that guide runs."""

GradientNorm = Literal["rms", "linf", "l2", "none"]


def class_gradient(log_probs: LogProbs, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """grad_x log p(y | x_t), (B, C, H, W), and log p(. | x_t), (B, K), both detached and float32."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        all_classes = log_probs(x, t)
        chosen = all_classes.gather(1, y[:, None]).sum()
        (gradient,) = torch.autograd.grad(chosen, x)
    return gradient.detach().float(), all_classes.detach().float()


def normalize_gradient(gradient: Tensor, norm: GradientNorm = "rms") -> Tensor:
    """grad* of Eq. 13, image by image: unit root mean square, unit maximum, unit length, or as it is.

    The paper does not state its norm. A gradient of exact zeros stays zero.
    """
    if norm == "none":
        return gradient
    flat = gradient.flatten(1)
    tiny = torch.finfo(gradient.dtype).tiny
    flat = flat / flat.abs().amax(1, keepdim=True).clamp(min=tiny)  # unit maximum: the squares of a sure guide's gradient underflow
    if norm != "linf":
        squares = flat.square()
        flat = flat / (squares.mean(1, keepdim=True) if norm == "rms" else squares.sum(1, keepdim=True)).sqrt().clamp(min=tiny)
    return flat.view_as(gradient)


def entropy_scale(log_probs: Tensor, scale: float | Tensor, scale_max: float | Tensor) -> Tensor:
    """s_t = clip(s_0 log K / H(p(. | x_t)), s_0, s_max), (B,): the surer the guide, the larger; capped since H -> 0 blows up."""
    classes = log_probs.shape[-1]
    ratio = math.log(classes) / entropy(log_probs).clamp(min=1e-12)
    low, high = (torch.as_tensor(limit, dtype=ratio.dtype) for limit in (scale, scale_max))
    return torch.minimum(torch.maximum(scale * ratio, low), torch.maximum(low, high))


def prototype_guidance(
    log_probs: LogProbs,
    y: Tensor,
    scale: float = 0.2,
    scale_max: float = 1.0,
    scale_rule: Literal["entropy", "fixed"] = "entropy",
    gradient_norm: GradientNorm = "rms",
    direction: Literal["toward", "away"] = "toward",
    gradient: ClassGradient | None = None,
) -> Guidance:
    """The guidance term of Eq. 13, s grad* log p~(y | x_t), as a function that a sampler calls once a step.

    Read literally the paper adds the gradient of the loss and so pushes away from the class: that is `direction="away"`.
    Plain classifier guidance, Eq. 4, is `scale_rule="fixed", gradient_norm="none"` with the sampler's variance as unit.

    Args:
        y: (B,) int64 classes asked for.
        gradient: an engine that computes what autograd would by way of `log_probs`, which is then not called.
    """

    def guidance(x: Tensor, t: Tensor) -> Push | None:
        if scale == 0:
            return None
        slope, all_classes = gradient(x, t, y) if gradient else class_gradient(log_probs, x, t, y)
        return push_of(slope, all_classes, y, scale, scale_max, scale_rule, gradient_norm, direction)

    return guidance


def push_of(
    slope: Tensor,
    all_classes: Tensor,
    y: Tensor,
    scale: float | Tensor,
    scale_max: float | Tensor,
    scale_rule: Literal["entropy", "fixed"],
    gradient_norm: GradientNorm,
    direction: Literal["toward", "away"],
) -> Push:
    """s grad* log p~(y | x_t) of Eq. 13 from what `class_gradient` gives, for rules as in `prototype_guidance`.

    Args:
        slope: (B, C, H, W).  all_classes: (B, K) log p.  y: (B,).
        scale, scale_max: s_0 and s_max, numbers or (B,).
    """
    s = entropy_scale(all_classes, scale, scale_max) if scale_rule == "entropy" else scale + torch.zeros_like(all_classes[:, 0])
    sign = 1.0 if direction == "toward" else -1.0
    push = sign * s.view(-1, 1, 1, 1) * normalize_gradient(slope, gradient_norm)
    return Push(push, all_classes.gather(1, y[:, None]).squeeze(1), s)


def classifier_free(with_label: Denoiser, without: Denoiser, scale: float, channels: int) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022) as a denoiser, for a conditional network and w = scale:

        eps <- (1 + w) eps(x_t, t, y) - w eps(x_t, t, null)

    The variance values stay those of the label.

    Args:
        with_label, without: the network with y bound, and with the null label.
        channels: C of the image; what the network gives beyond are variance values.
    """
    if not scale:
        return with_label

    def guided(x: Tensor, t: Tensor) -> Tensor:
        conditional = with_label(x, t)
        eps = (1 + scale) * conditional[:, :channels] - scale * without(x, t)[:, :channels]
        return torch.cat([eps, conditional[:, channels:]], 1)

    return guided
