"""The filters, by hand: the distance band, the guide's confidence, and why an image is dropped."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from engines.errors import UsageError
from engines.recipe import SelectSection, load
from engines.synthesis.select import Figures, class_band, is_on, look, measure, reason_to_drop


def select(**settings: float | tuple[float, float]) -> SelectSection:
    return SelectSection.model_validate(settings)


def test_the_reach_is_the_largest_distance_between_two_real_images() -> None:
    band = class_band(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 2.0]]))
    assert band.reach == pytest.approx(5.0)
    assert torch.allclose(band.mean, torch.tensor([1.0, 2.0]))
    figures = measure(torch.tensor([2.0, 3.0]), torch.tensor([0.25, 0.75]).log(), 1, band)
    # The nearest others lie 2, 2 and sqrt(13) away; the nearest of this image sqrt(2), to (3, 4).
    assert band.gap == pytest.approx(2.0)
    assert figures == pytest.approx((math.sqrt(2), 5.0, 0.75, math.sqrt(2) / 2))


def test_the_gap_is_the_same_however_many_rows_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.rand(11, 3, generator=torch.Generator().manual_seed(0))
    whole = class_band(features)
    nearest = sorted(min(float((a - b).norm()) for j, b in enumerate(features) if j != i) for i, a in enumerate(features))
    monkeypatch.setattr("engines.synthesis.select.PAIRS_ROWS", 4)
    assert (class_band(features).gap, class_band(features).reach) == pytest.approx((whole.gap, whole.reach))
    assert whole.gap == pytest.approx(nearest[5])


def test_the_reach_of_a_class_drawn_together_is_not_rounded_away() -> None:
    """Thirty unit vectors within 1e-3: products of float32 would be off by as much."""
    center = nn.functional.normalize(torch.ones(1, 128), dim=1)
    features = center.repeat(30, 1)
    features[0, 0] += 1e-3
    assert class_band(features).reach == pytest.approx(1e-3, rel=1e-3)


def test_an_image_is_kept_up_to_the_band_and_dropped_beyond() -> None:
    assert reason_to_drop(Figures(4.0, 2.0, 0.1), select(distance_band=2.0)) == ""
    assert reason_to_drop(Figures(4.001, 2.0, 0.1), select(distance_band=2.0)) == "distance"


def test_an_image_is_kept_from_the_confidence_on_and_dropped_below() -> None:
    assert reason_to_drop(Figures(confidence=0.8), select(confidence=0.8)) == ""
    assert reason_to_drop(Figures(confidence=0.79), select(confidence=0.8)) == "confidence"


def test_an_image_is_kept_inside_the_novelty_band_whose_ends_count() -> None:
    for novelty, reason in ((0.74, "novelty"), (0.75, ""), (2.5, ""), (2.51, "novelty"), (None, "")):
        assert reason_to_drop(Figures(0.1, 2.0, 0.9, novelty), select(novelty_band=(0.75, 2.5))) == reason
    assert reason_to_drop(Figures(0.1, 2.0, 0.1, 9.0), select(novelty_band=(0.75, 2.5), confidence=0.5)) == "confidence"


def test_an_empty_novelty_band_is_refused() -> None:
    with pytest.raises(UsageError, match=r"select.novelty_band \[2, 1\] is empty"):
        load('name = "x"', ("select.novelty_band=[2, 1]",))


def test_both_reasons_are_told() -> None:
    assert reason_to_drop(Figures(4.001, 2.0, 0.79), select(distance_band=2.0, confidence=0.8)) == "both"


@pytest.mark.parametrize("real", [1, 4])
def test_a_class_of_one_image_or_of_one_image_many_times_has_no_band(real: int) -> None:
    band = class_band(torch.ones(real, 3))
    figures = measure(torch.full((3,), 100.0), torch.zeros(2), 0, band)
    assert (figures.reach, figures.novelty, band.gap) == (None, None, 0.0)
    assert reason_to_drop(figures, select(novelty_band=(0.5, 1.0))) == ""
    assert reason_to_drop(figures, select(distance_band=1.0)) == ""


@given(st.floats(0, 10), st.floats(0, 1), st.floats(0.1, 5), st.floats(0.01, 1), st.floats(0, 5), st.floats(0, 1))
def test_a_looser_filter_never_drops_what_a_tighter_one_keeps(
    distance: float, confidence: float, width: float, least: float, wider: float, lower: float
) -> None:
    figures = Figures(distance, 1.0, confidence)
    if not reason_to_drop(figures, select(distance_band=width, confidence=least)):
        assert not reason_to_drop(figures, select(distance_band=width + wider, confidence=least * lower))


def test_without_a_filter_everything_is_kept_and_nothing_is_measured() -> None:
    assert not is_on(select())
    assert is_on(select(confidence=0.1))
    assert is_on(select(distance_band=0.1))
    assert is_on(select(novelty_band=(0.0, 2.0)))
    assert reason_to_drop(Figures(), select()) == ""


class KnownGuide(nn.Module):
    """f(x, t) = (cos, sin) of the first pixel, and keeps the t of its calls; prototypes at 0 and at a right angle."""

    tau = 0.5
    prototypes = torch.eye(2)
    log_prior = torch.tensor([0.9, 0.1]).log()

    def __init__(self) -> None:
        super().__init__()
        self.times: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.times.append(t)
        angle = x[:, 0, 0, 0]
        return torch.stack([angle.cos(), angle.sin()], 1)


def test_the_confidence_is_equation_12_of_the_clean_image_in_one_pass() -> None:
    guide = KnownGuide()
    x = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    seen = look(guide, x)  # type: ignore[arg-type]
    assert [t.tolist() for t in guide.times] == [[0, 0]]
    for row, angle in enumerate((0.0, 1.0)):
        head, tail = 0.9 * math.exp(math.cos(angle) / 0.5), 0.1 * math.exp(math.sin(angle) / 0.5)
        assert measure(seen.features[row], seen.log_probs[row], 1, None).confidence == pytest.approx(tail / (head + tail))
