"""Real or generated: told by chance where nothing differs, and not by how many images a class has."""

from __future__ import annotations

import numpy as np
import pytest

from engines.evaluation.shortcut import Shortcut, real_or_generated


def features(labels: np.ndarray, seed: int, shift: float = 0.0) -> np.ndarray:
    """Classes far apart; `shift` moves all of them."""
    return np.random.default_rng(seed).standard_normal((len(labels), 8)) + 5 * labels[:, None] + shift


def test_images_of_one_distribution_are_told_apart_by_chance_alone_although_their_classes_are_not_equally_frequent() -> None:
    real, generated = np.repeat([0, 1], [300, 100]), np.repeat([0, 1, 7], [100, 300, 9])
    found = real_or_generated(features(real, 0), features(generated, 1), real, generated)
    assert found is not None
    assert found.images == 200
    assert abs(found.accuracy - 50) < 3 * found.error


def test_a_shift_is_told_as_often_as_the_best_rule_would() -> None:
    """Of two unit normals 2 d apart the best rule is right with probability Phi(d); here d = sqrt(8) / 4 = 0.707, 76.0 %."""
    labels = np.repeat([0, 1], 1000)
    found = real_or_generated(features(labels, 0), features(labels, 1, shift=0.5), labels, labels)
    assert found is not None
    assert found.accuracy == pytest.approx(76.0, abs=2.5)


def test_the_same_seed_gives_the_same_answer_and_few_images_none() -> None:
    labels = np.repeat([0, 1], 30)
    a, b = features(labels, 0), features(labels, 1)
    assert real_or_generated(a, b, labels, labels, seed=3) == real_or_generated(a, b, labels, labels, seed=3)
    assert real_or_generated(a[:19], b, labels[:19], labels) is None


def test_the_error_of_an_answer_that_was_never_wrong_is_not_0() -> None:
    assert 0 < Shortcut(100.0, 50).error < 2
    assert Shortcut(50.0, 200).error == pytest.approx(2.5, rel=0.01)
