"""Held-out images: which ones, and a loss that the network alone changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from engines.data.batches import to_tensor
from engines.data.decode import Frame
from engines.data.images import ArrayReader, ImageSet, Shelf
from engines.diffusion.schedule import make_schedule, q_sample
from engines.training import holdout
from engines.training.holdout import DRAWS, held_out_loss, noise_levels, split

SCHEDULE = make_schedule("cosine", 1000)
GROUPS = ("many", "medium", "few")


def images(counts: tuple[int, ...] = (9, 6, 5)) -> ImageSet:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(counts)), counts)
    pixels = rng.integers(0, 256, (len(labels), 4, 4, 1)).astype(np.uint8)
    return ImageSet(labels, tuple("abc"[: len(counts)]), Shelf(ArrayReader(pixels, "test"), Frame(4, 1)))


class Constant(nn.Module):
    """eps = its one value everywhere, and a second half that must not count."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = value
        self.given: list[Tensor] = []
        self.modes: set[bool] = set()

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.given += [] if y is None else [y]
        self.modes.add(self.training)
        return torch.cat([torch.full_like(x, self.value), torch.full_like(x, 99.0)], dim=1)


# ------------------------------------------------------------------------------------------------------------------- split


@pytest.mark.parametrize(
    ("count", "fraction", "held"),
    [(100, 0.1, 10), (15, 0.1, 2), (14, 0.1, 1), (5, 0.1, 1), (4, 0.1, 1), (3, 0.1, 0), (2, 0.5, 0), (1, 0.5, 0), (5, 0.9, 2), (5, 0.0, 0)],
)
def test_a_class_gives_its_rounded_share_at_least_one_and_keeps_three(count: int, fraction: float, held: int) -> None:
    assert len(split(np.zeros(count, dtype=np.int64), np.array([0]), fraction, seed=0)) == held


def test_only_the_named_classes_give_images_and_no_image_twice() -> None:
    labels = np.array([0, 1, 2] * 20)
    held = split(labels, np.array([1, 2]), 0.25, seed=3)
    assert np.bincount(labels[held], minlength=3).tolist() == [0, 5, 5]
    assert np.array_equal(held, np.unique(held))
    assert held.dtype == np.int64


def test_what_a_class_gives_depends_on_the_seed_and_on_that_class_alone() -> None:
    labels = np.repeat([0, 1], 40)
    both, alone = split(labels, np.array([0, 1]), 0.2, seed=0), split(labels, np.array([1]), 0.2, seed=0)
    assert np.array_equal(both[labels[both] == 1], alone)
    assert not np.array_equal(alone, split(labels, np.array([1]), 0.2, seed=1))
    assert not np.array_equal(both[labels[both] == 0], alone - 40)


@given(st.lists(st.integers(0, 4), max_size=60), st.floats(0, 1), st.integers(0, 5))
def test_every_class_that_gives_an_image_keeps_three(labels: list[int], fraction: float, seed: int) -> None:
    y = np.array(labels, dtype=np.int64)
    kept = np.delete(y, split(y, np.arange(5), fraction, seed))
    for k in range(5):
        assert (kept == k).sum() >= min(3, (y == k).sum())


# -------------------------------------------------------------------------------------------------------------------- loss


def test_each_image_is_judged_once_in_every_eighth_of_t() -> None:
    for image in range(50):
        levels, noise = noise_levels(1000, 0, image, (1, 4, 4))
        assert (levels // (1000 // DRAWS)).tolist() == list(range(DRAWS))
        assert noise.shape == (DRAWS, 1, 4, 4)
    few_steps, _ = noise_levels(3, 0, 0, (1, 4, 4))
    assert few_steps.min() >= 0 and few_steps.max() <= 2


def test_of_a_network_that_always_says_zero_the_loss_is_the_noises_mean_square_by_group() -> None:
    data, held = images(), np.array([0, 8, 9, 14, 15, 19])
    figures = held_out_loss(Constant(), data, held, GROUPS, SCHEDULE, 0, conditional=False)
    squares = [float(noise_levels(1000, 0, i, (1, 4, 4))[1].double().square().mean()) for i in held.tolist()]
    many, medium, few = np.array(squares).reshape(3, 2).mean(1)
    assert figures["held_out_many"] == pytest.approx(many, rel=1e-5)
    assert figures["held_out_medium"] == pytest.approx(medium, rel=1e-5)
    assert figures["held_out_few"] == pytest.approx(few, rel=1e-5)
    assert figures["held_out"] == pytest.approx((medium + few) / 2, rel=1e-5)


def test_a_network_that_knows_the_images_has_no_loss() -> None:
    data, held = images(), np.array([15])

    class Oracle(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            abar = SCHEDULE.alphas_cumprod[t].view(-1, 1, 1, 1)
            x0 = to_tensor(data.pixels(held)).repeat_interleave(DRAWS, dim=0)
            return (x - abar.sqrt() * x0) / (1 - abar).sqrt()

    assert held_out_loss(Oracle(), data, held, GROUPS, SCHEDULE, 0, conditional=False)["held_out"] < 1e-6


def test_the_network_sees_noised_images_at_their_own_timesteps() -> None:
    data, seen = images(), []

    class Watcher(Constant):
        def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            seen.append((x, t))
            return super().forward(x, t, y)

    held_out_loss(Watcher(), data, np.array([11]), GROUPS, SCHEDULE, 5, conditional=False)
    j, noise = noise_levels(1000, 5, 11, (1, 4, 4))
    x0 = to_tensor(data.pixels(np.array([11] * DRAWS)))
    assert torch.equal(seen[0][0], q_sample(SCHEDULE, x0, j, noise))
    assert torch.equal(seen[0][1], j)


def test_the_figures_do_not_depend_on_the_batch_or_on_which_other_images_are_held_out() -> None:
    data, net = images(), Constant(0.3)
    whole = held_out_loss(net, data, np.arange(20), GROUPS, SCHEDULE, 0, conditional=False, batch_size=1000)
    assert whole == pytest.approx(held_out_loss(net, data, np.arange(20), GROUPS, SCHEDULE, 0, conditional=False, batch_size=1))
    alone = held_out_loss(net, data, np.arange(15, 20), GROUPS, SCHEDULE, 0, conditional=False)
    assert alone["held_out_few"] == pytest.approx(whole["held_out_few"])
    assert alone["held_out"] == alone["held_out_few"]
    assert held_out_loss(net, data, np.arange(20), GROUPS, SCHEDULE, 1, conditional=False) != whole


def test_a_conditional_network_is_given_the_true_labels() -> None:
    net = Constant()
    held_out_loss(net, images(), np.array([2, 10, 19]), GROUPS, SCHEDULE, 0, conditional=True, batch_size=8)
    assert torch.cat(net.given).view(-1, DRAWS).tolist() == [[0] * DRAWS, [1] * DRAWS, [2] * DRAWS]


def test_the_network_is_judged_without_dropout_and_left_as_it_was() -> None:
    net = Constant()
    net.train()
    held_out_loss(net, images(), np.array([2, 10]), GROUPS, SCHEDULE, 0, conditional=False)
    assert net.modes == {False}
    assert net.training


def test_where_only_head_images_are_held_out_they_judge_and_without_any_there_are_no_figures() -> None:
    figures = held_out_loss(Constant(), images(), np.array([0]), GROUPS, SCHEDULE, 0, conditional=False)
    assert set(figures) == {"held_out", "held_out_many"}
    assert held_out_loss(Constant(), images(), np.zeros(0, dtype=np.int64), GROUPS, SCHEDULE, 0, conditional=False) == {}


def test_of_a_large_group_a_bounded_number_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdout, "IMAGES_A_GROUP", 3)
    net = Constant()
    held_out_loss(net, images(), np.arange(9), GROUPS, SCHEDULE, 0, conditional=True)
    assert len(torch.cat(net.given)) == 3 * DRAWS
