"""Timestep samplers: their weights make every estimate unbiased, and what they remember is the last ten losses."""

from __future__ import annotations

from collections import defaultdict, deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engines.diffusion.timesteps import HISTORY, TimestepKind, TimestepSampler, stratify

KINDS: tuple[TimestepKind, ...] = ("uniform", "stratified", "loss-second-moment")


def uniforms(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def warmed(losses: Tensor) -> TimestepSampler:
    """A sampler that has seen losses[t] ten times at each t."""
    sampler = TimestepSampler("loss-second-moment", len(losses))
    for _ in range(HISTORY):
        sampler.update(torch.arange(len(losses)), losses)
    return sampler


def test_uniform_is_the_floor_of_u_t_with_weight_1() -> None:
    t, weight = TimestepSampler("uniform", 1000)(torch.tensor([0.0, 0.0009999, 0.0010001, 0.5, 1 - 2**-24]))
    assert t.tolist() == [0, 0, 1, 500, 999]
    assert t.dtype == torch.int64
    assert weight.tolist() == [1.0] * 5


def test_no_u_reaches_t_itself() -> None:
    for steps in (1, 3, 1000, 10**5 + 1):
        for kind in KINDS:
            t, _ = TimestepSampler(kind, steps)(torch.tensor([0.0, 1 - 2**-24]))
            assert t[0] == 0
            assert t[1] <= steps - 1


def test_importance_sampling_of_two_timesteps_is_exact() -> None:
    # losses 3 and 1: p = 0.75, 0.25 but for 0.001 uniform; E[weight f(t)] = sum of p weight f = mean of f
    sampler = warmed(torch.tensor([3.0, 1.0]))
    p = sampler.probabilities()
    assert p.tolist() == pytest.approx([0.999 * 0.75 + 0.0005, 0.999 * 0.25 + 0.0005])
    edge = float(p[0])
    t, weight = sampler(torch.tensor([0.0, edge - 1e-6, edge + 1e-6, 0.99999], dtype=torch.float64))
    assert t.tolist() == [0, 0, 1, 1]
    assert weight.tolist() == pytest.approx([0.5 / edge, 0.5 / edge, 0.5 / (1 - edge), 0.5 / (1 - edge)])
    f = torch.tensor([5.0, -2.0]).double()
    assert float((p * f * weight[[0, 2]]).sum()) == pytest.approx(1.5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weighted_mean_over_draws_is_the_mean_over_all_timesteps(kind: TimestepKind) -> None:
    losses = 0.01 + torch.linspace(1, 0, 50) ** 4  # smooth in t, as real ones are
    sampler = warmed(losses) if kind == "loss-second-moment" else TimestepSampler(kind, 50)
    f = (losses * (1 + 0.3 * uniforms(50, seed=2))).double()
    batches = uniforms(2_000, 16)
    estimates = []
    for u in batches:
        t, weight = sampler(sampler.spread(u))
        estimates.append(float((weight.double() * f[t]).mean()))
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - float(f.mean())) < 4 * error
    plain = float(f.var()) / 16
    if kind != "uniform":  # what the other two are for: less spread from the same number of images
        assert np.var(estimates) < 0.5 * plain


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 60), st.integers(0, 2**32))
def test_each_stratum_gets_one_image_and_a_shuffled_batch_is_shuffled_alike(batch: int, seed: int) -> None:
    u = uniforms(batch, seed=seed)
    v = stratify(u)
    assert sorted((v * batch).long().tolist()) == list(range(batch))
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    if len(u.unique()) == batch:
        assert torch.equal(stratify(u[order]), v[order])
    assert v.min() >= 0
    assert v.max() < 1


def test_every_image_of_a_stratified_batch_is_uniform_by_itself_and_neighbors_share_no_stratum_more_than_chance() -> None:
    v = torch.stack([stratify(u) for u in uniforms(10_000, 8)])
    for i in (0, 3, 7):
        bins = torch.bincount((v[:, i] * 40).long(), minlength=40).double()  # five to a stratum
        chi2 = float(((bins - 250) ** 2 / 250).sum())
        assert chi2 < 39 + 4 * np.sqrt(2 * 39)
    stratum = (v * 8).long().double()
    assert float(torch.corrcoef(stratum[:, :2].t())[0, 1]) == pytest.approx(-1 / 7, abs=4 / np.sqrt(10_000))


def test_it_is_uniform_until_every_timestep_has_ten_losses() -> None:
    sampler = TimestepSampler("loss-second-moment", 4)
    for _ in range(HISTORY):
        sampler.update(torch.arange(3), torch.tensor([1.0, 2.0, 3.0]))
    for _ in range(HISTORY - 1):
        sampler.update(torch.tensor([3]), torch.tensor([4.0]))
    assert sampler.probabilities().tolist() == [0.25] * 4
    sampler.update(torch.tensor([3]), torch.tensor([4.0]))
    assert sampler.probabilities().tolist() == pytest.approx([0.999 * k / 10 + 0.00025 for k in (1, 2, 3, 4)])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 100, width=32)), min_size=1, max_size=40), min_size=1, max_size=6))
def test_the_history_is_the_last_ten_losses_of_each_timestep_in_the_order_of_the_batches(batches: list[list[tuple[int, float]]]) -> None:
    sampler, by_hand = TimestepSampler("loss-second-moment", 4), defaultdict(lambda: deque(maxlen=HISTORY))
    for batch in batches:
        sampler.update(torch.tensor([t for t, _ in batch]), torch.tensor([loss for _, loss in batch]))
        for t, loss in batch:
            by_hand[t].append(loss)
    for t in range(4):
        seen = sum(k == t for batch in batches for k, _ in batch)
        assert int(sampler.count[t]) == seen
        assert sorted(sampler.history[t, : min(seen, HISTORY)].tolist()) == sorted(by_hand[t])


def test_a_loss_that_is_not_finite_is_not_remembered() -> None:
    sampler = warmed(torch.tensor([3.0, 1.0]))
    before = sampler.probabilities()
    sampler.update(torch.tensor([0, 1, 0]), torch.tensor([float("nan"), float("inf"), 3.0]))
    assert torch.equal(sampler.probabilities(), before)
    assert sampler.count.tolist() == [11, 10]


def test_losses_of_zero_everywhere_leave_it_uniform() -> None:
    assert warmed(torch.zeros(3)).probabilities().tolist() == pytest.approx([1 / 3] * 3)


def test_a_reloaded_sampler_draws_and_remembers_the_same() -> None:
    first = warmed(torch.tensor([3.0, 1.0, 0.2]))
    second = TimestepSampler("loss-second-moment", 3)
    second.load_state_dict(first.state_dict())
    for sampler in (first, second):
        sampler.update(torch.tensor([2, 2]), torch.tensor([5.0, 4.0]))
    u = uniforms(100)
    for a, b in zip(first(u), second(u), strict=True):
        assert torch.equal(a, b)
    assert not TimestepSampler("uniform", 3).state_dict()
