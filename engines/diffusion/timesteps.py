"""Which training timestep each image of a batch is noised to: uniform, stratified, or where the variational term is large."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

HISTORY = 10  # losses remembered of each timestep (Nichol & Dhariwal 2021)
UNIFORM_SHARE = 0.001  # of the draws are uniform, so that no timestep is ever forgotten
_BITS = 24  # of a float32 in [0, 1)
_GOLDEN = 10368891  # odd, 2^24 times the golden ratio's fraction: its multiples modulo 2^24 fill every interval evenly

TimestepKind = Literal["uniform", "stratified", "loss-second-moment"]


class TimestepSampler(nn.Module):
    """Draws t, and the weight that keeps the loss an estimate of its mean over all timesteps.

        uniform             t = floor(u T)
        stratified          the same, where `spread` has put each u of a batch into a stratum of its own
        loss-second-moment  p(t) ~ sqrt(mean of the last 10 squared losses at t), mixed with 0.001 uniform; uniform until every t has 10

    weight = 1 / (T p(t)), so that E[weight f(t)] = mean of f over t. Randomness is the argument u alone: with its buffers, which a
    checkpoint holds, the sampler is a pure function.

    Args:
        steps: T.
    """

    history: Tensor  # (T, 10) float32, the last losses at each t, oldest overwritten first
    count: Tensor  # (T,) int64, losses seen at each t

    def __init__(self, kind: TimestepKind, steps: int) -> None:
        super().__init__()
        self.kind = kind
        self.steps = steps
        if kind == "loss-second-moment":
            self.register_buffer("history", torch.zeros(steps, HISTORY))
            self.register_buffer("count", torch.zeros(steps, dtype=torch.int64))

    def spread(self, u: Tensor) -> Tensor:
        """u (B,) as `forward` wants it: of the whole global batch, before it is cut for ranks and micro-batches; no buffer is read."""
        return stratify(u) if self.kind == "stratified" else u

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u (B,) in [0, 1) -> t (B,) int64 in 0..T-1, weight (B,) float32; image by image, whatever part of a batch it is."""
        if self.kind != "loss-second-moment":
            return (u * self.steps).long().clamp(max=self.steps - 1), torch.ones_like(u, dtype=torch.float32)
        p = self.probabilities()
        cumulated = p.cumsum(0)
        t = torch.searchsorted(cumulated, u.double() * cumulated[-1], right=True).clamp(max=self.steps - 1)
        return t, (1 / (self.steps * p[t])).float()

    def probabilities(self) -> Tensor:
        """p(t), (T,) float64, all positive."""
        if self.kind != "loss-second-moment":
            return torch.full((self.steps,), 1 / self.steps, dtype=torch.float64)
        size = self.history.double().square().mean(1).sqrt()
        share = torch.where(size.sum() > 0, size / size.sum(), 1 / self.steps)
        mixed = (1 - UNIFORM_SHARE) * share + UNIFORM_SHARE / self.steps
        return torch.where((self.count >= HISTORY).all(), mixed, torch.full_like(mixed, 1 / self.steps))

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Remember the unweighted losses (B,) at t (B,), of the whole global batch in its order; what is not finite is left out."""
        if self.kind != "loss-second-moment":
            return
        losses = losses.detach().float()
        finite = losses.isfinite()
        same = (t[:, None] == t) & finite  # (B, B)
        earlier = same.tril(-1).sum(1)  # losses at the same t that come before
        kept = finite & (same.sum(1) - earlier <= HISTORY)  # more would overwrite each other, in no fixed order on a GPU
        row = torch.where(kept, t, self.steps)  # what is not kept goes to a row that is cut off
        place = (self.count[t] + earlier) % HISTORY
        history = torch.cat([self.history, self.history.new_zeros(1, HISTORY)])
        history[row, place] = losses
        self.history.copy_(history[:-1])
        self.count += torch.zeros_like(self.count).index_add_(0, t, finite.long())


def stratify(u: Tensor) -> Tensor:
    """One value in each stratum [i/B, (i+1)/B), in shuffled order: (B,) float64 in [0, 1), every one uniform by itself.

    Image i gets (r_i + u_i) / B with r the ranks of u's bits multiplied by a constant: a shuffle that needs no second draw, and that
    tells nothing of where in its stratum u_i lies (the ranks of u itself would: a small rank means a small u).

    Args:
        u: (B,) in [0, 1), 24 random bits each.
    """
    bits = (u.double() * 2**_BITS).long()
    ranks: Tensor = (bits * _GOLDEN % 2**_BITS).argsort(stable=True).argsort()
    return (ranks + u.double()) / len(u)
