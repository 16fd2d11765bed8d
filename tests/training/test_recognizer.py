"""Recognizer training: its losses by hand, its batches as pure functions, and that it learns."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from engines.errors import NumericsError
from engines.recipe import RecognizerSection
from engines.training.recognizer import (
    TrainingImages,
    batch_indices,
    features,
    learning_rate,
    log_priors,
    predict,
    predict_probabilities,
    real_images,
    train_recognizer,
    weighted_cross_entropy,
)


def section(**changes: Any) -> RecognizerSection:
    values: dict[str, Any] = {
        "architecture": "resnet8",
        "train_steps": 30,
        "batch_size": 16,
        "warmup_steps": 3,
        "schedule": "cosine",
        "horizontal_flip": False,
        "crop_padding_px": 1,
    }
    return RecognizerSection(**(values | changes))


def toy(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three classes told apart by the bright row; noise elsewhere. pixels (N, 8, 8, 1) uint8, labels (N,)."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    pixels = random.integers(0, 60, (count, 8, 8, 1), dtype=np.uint8)
    pixels[np.arange(count), 1 + 2 * labels] += 180
    return pixels, labels


def weights_of(images: TrainingImages, seed: int = 0, loss: Any = "cross_entropy", **changes: Any) -> dict[str, torch.Tensor]:
    return train_recognizer(images, 3, section(**changes), loss, seed).state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_balanced_softmax_is_the_formula_worked_by_hand() -> None:
    logits, counts = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([10.0, 4.0, 1.0])
    by_hand = -math.log(4 * math.exp(2.0) / (10 * math.exp(1.0) + 4 * math.exp(2.0) + 1 * math.exp(0.5)))
    value = weighted_cross_entropy(logits, torch.tensor([1]), torch.ones(1), (counts / counts.sum()).log())
    assert float(value) == pytest.approx(by_hand, rel=1e-6)


def test_a_zero_prior_is_cross_entropy_and_so_is_a_uniform_one() -> None:
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    expected = torch.nn.functional.cross_entropy(logits, labels)
    for prior in (torch.zeros(4), torch.full((4,), math.log(0.25))):
        torch.testing.assert_close(weighted_cross_entropy(logits, labels, torch.ones(6), prior), expected)


def test_a_weight_of_two_is_the_image_given_twice() -> None:
    logits, labels = torch.randn(3, 4), torch.tensor([0, 3, 2])
    twice = torch.tensor([0, 1, 1, 2])
    torch.testing.assert_close(
        weighted_cross_entropy(logits, labels, torch.tensor([1.0, 2.0, 1.0]), torch.zeros(4)),
        weighted_cross_entropy(logits[twice], labels[twice], torch.ones(4), torch.zeros(4)),
    )


def test_a_prior_leaves_out_a_class_that_cannot_occur() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    weighted_cross_entropy(logits, torch.tensor([0, 2]), torch.ones(2), torch.tensor([0.5, 0.0, 0.5]).log()).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[:, 1].any()


def test_priors_come_from_the_real_counts_or_from_all_images_by_weight() -> None:
    pixels = np.zeros((5, 8, 8, 1), np.uint8)
    images = real_images(pixels, np.array([0, 0, 0, 1, 1])).add(pixels, np.array([1, 1, 1, 1, 2]), weight=0.5)
    assert not log_priors(images, 3, "cross_entropy", real_only=True).any()
    real = log_priors(images, 3, "balanced_softmax", real_only=True)
    torch.testing.assert_close(real[0].exp(), torch.tensor([3 / 5, 2 / 5, 0.0]))
    assert not real[1].any()
    pooled = log_priors(images, 3, "balanced_softmax", real_only=False)
    torch.testing.assert_close(pooled.exp(), torch.tensor([[3.0, 4.0, 0.5]] * 2) / 7.5)


def test_a_recognizer_learns_a_separable_toy_set() -> None:
    model = train_recognizer(real_images(*toy(60)), 3, section(train_steps=60), "cross_entropy", seed=1)
    pixels, labels = toy(90, seed=9)
    assert (predict(model, pixels) == labels).mean() > 0.95
    probabilities = predict_probabilities(model, pixels)
    assert (probabilities.shape, probabilities.dtype) == ((len(pixels), int(labels.max()) + 1), np.float32)
    np.testing.assert_allclose(probabilities.sum(1), 1.0, rtol=1e-5)
    assert np.array_equal(probabilities.argmax(1), predict(model, pixels))
    assert features(model, pixels).shape == (90, 64)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    images = real_images(*toy(40))
    first = weights_of(images, seed=3)
    assert same(first, weights_of(images, seed=3))
    assert not same(first, weights_of(images, seed=4))


def test_synthetic_images_of_weight_zero_are_as_good_as_absent() -> None:
    images = real_images(*toy(40))
    assert same(weights_of(images), weights_of(images.add(*toy(20, seed=5), weight=0.0)))


def test_a_last_phase_of_all_steps_on_real_images_never_sees_an_extra_one() -> None:
    images, extra = real_images(*toy(40)), toy(20, seed=5)
    alone = weights_of(images, loss="balanced_softmax")
    assert same(alone, weights_of(images.add(*extra), loss="balanced_softmax", real_only_fraction=1.0))
    assert not same(alone, weights_of(images.add(*extra), loss="balanced_softmax", real_only_fraction=0.5))


def test_balanced_softmax_on_a_balanced_set_is_cross_entropy() -> None:
    images = real_images(*toy(42))
    pairs = zip(weights_of(images).values(), weights_of(images, loss="balanced_softmax").values(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in pairs)


def test_an_epoch_holds_every_image_once_and_batches_run_over_its_end() -> None:
    members = np.array([3, 5, 7, 11, 13, 17, 19])
    drawn = np.concatenate([batch_indices(members, 4, seed=2, step=step) for step in range(7)])
    for epoch in drawn.reshape(4, 7):
        assert sorted(epoch) == members.tolist()
    assert (batch_indices(members, 20, seed=2, step=0)[:7] == drawn[:7]).all()


def test_a_batch_is_a_pure_function_of_seed_and_step() -> None:
    members = np.arange(50)
    late = batch_indices(members, 8, seed=1, step=40)
    batch_indices(members, 8, seed=2, step=3)
    assert (batch_indices(members, 8, seed=1, step=40) == late).all()


def test_threads_that_augment_ahead_change_nothing() -> None:
    images = real_images(*toy(60))
    policy = {"policy": "randaugment", "train_steps": 6}
    assert same(weights_of(images, **policy, workers=0), weights_of(images, **policy, workers=2))


def test_the_learning_rate_warms_up_and_then_falls_as_the_recipe_says() -> None:
    cosine = section(train_steps=103, lr=0.2)
    assert [learning_rate(cosine, step) for step in (0, 1, 2)] == pytest.approx([0.2 / 3, 0.4 / 3, 0.2])
    assert learning_rate(cosine, 53) == pytest.approx(0.1)
    assert learning_rate(cosine, 102) < 1e-4
    steps = section(train_steps=100, lr=0.1, schedule="step", milestones=(0.8, 0.9), decay=0.01)
    assert [learning_rate(steps, step) for step in (79, 80, 90)] == pytest.approx([0.1, 1e-3, 1e-5])


def test_a_diverged_recognizer_is_an_error_and_not_a_result() -> None:
    images = real_images(*toy(12))
    broken = TrainingImages(images.pixels, images.labels, images.weights * float("nan"), images.is_extra)
    with pytest.raises(NumericsError):
        train_recognizer(broken, 3, section(train_steps=1), "cross_entropy", seed=0)
