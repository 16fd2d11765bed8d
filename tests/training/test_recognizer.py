"""Recognizer training: its batches as pure functions, that it learns in every way of the literature, and that it can be interrupted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines.errors import DataError, NumericsError
from engines.networks.resnet import NormalizedLinear
from engines.progress import Report
from engines.recipe import METHODS, Method, RecognizerSection
from engines.training.recognizer import (
    TWO_STAGES,
    TrainingImages,
    _held_out,
    batch_indices,
    features,
    learning_rate,
    predict,
    predict_probabilities,
    real_images,
    train_recognizer,
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


def weights_of(images: TrainingImages, seed: int = 0, method: Any = "cross_entropy", **changes: Any) -> dict[str, torch.Tensor]:
    return train_recognizer(images, 3, section(**changes), method, seed).state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


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
    alone = weights_of(images, method="balanced_softmax")
    assert same(alone, weights_of(images.add(*extra), method="balanced_softmax", real_only_fraction=1.0))
    assert not same(alone, weights_of(images.add(*extra), method="balanced_softmax", real_only_fraction=0.5))


def test_balanced_softmax_on_a_balanced_set_is_cross_entropy() -> None:
    images = real_images(*toy(42))
    pairs = zip(weights_of(images).values(), weights_of(images, method="balanced_softmax").values(), strict=True)
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


LONG_TAIL = (24, 8, 4)


def long_tailed() -> TrainingImages:
    """The toy set with 24, 8 and 4 images a class, and 6 extra ones of weight 0.5."""
    pixels, labels = toy(90)
    kept = np.concatenate([np.flatnonzero(labels == k)[:n] for k, n in enumerate(LONG_TAIL)])
    return real_images(pixels[kept], labels[kept]).add(*toy(6, seed=5), weight=0.5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_the_toy_set_with_extra_images(method: Method) -> None:
    model = train_recognizer(long_tailed(), 3, section(train_steps=80, second_stage_fraction=0.25), method, seed=1)
    pixels, labels = toy(90, seed=9)
    assert (predict(model, pixels) == labels).mean() > 0.9
    assert predict_probabilities(model, pixels).sum(1) == pytest.approx(np.ones(90), abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_bit_by_bit_where_it_was_interrupted(method: Method, tmp_path: Path) -> None:
    images, chosen, checkpoint = (
        long_tailed(),
        section(train_steps=12, second_stage_fraction=0.67, save_every_steps=5),
        tmp_path / "c.safetensors",
    )

    class Stop(Exception):
        pass

    def stopping_after(step: int) -> Report:
        def hear(what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
            if done == step:
                raise Stop

        return hear

    whole = train_recognizer(images, 3, chosen, method, seed=2).state_dict()
    for stop in (7, 13, 18) if method in TWO_STAGES else (7,):
        with pytest.raises(Stop):
            train_recognizer(images, 3, chosen, method, 2, None, stopping_after(stop), checkpoint)
    heard: list[int] = []
    resumed = train_recognizer(images, 3, chosen, method, 2, None, lambda what, done, total, figures: heard.append(done), checkpoint)
    assert heard[0] == (18 if method in TWO_STAGES else 6)
    assert same(whole, resumed.state_dict())


@pytest.mark.parametrize("method", ["crt", "lws", "tau_norm", "mislas"])
def test_a_second_stage_leaves_the_backbone_bit_equal(method: Method) -> None:
    images, first = real_images(*toy(9)), {"crt": "cross_entropy", "lws": "cross_entropy", "tau_norm": "cross_entropy", "mislas": "mixup"}
    alone = weights_of(images, method=first[method], tau_norm_holdout=0.0)
    after = weights_of(images, method=method, tau_norm_holdout=0.0, second_stage_fraction=0.1)
    assert {name for name in alone if not torch.equal(alone[name], after[name])} == {"classifier.weight", "classifier.bias"}


def test_mislas_may_shift_the_running_means_and_nothing_else_of_the_backbone() -> None:
    images = real_images(*toy(9))
    alone = weights_of(images, method="mixup")
    after = weights_of(images, method="mislas", second_stage_fraction=0.1, mislas_shift_batch_norm=True)
    changed = {name.rpartition(".")[2] for name in alone if not torch.equal(alone[name], after[name]) and "classifier" not in name}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}


def test_a_second_stage_after_a_last_phase_on_real_images_draws_no_extra_one() -> None:
    images, extra = real_images(*toy(40)), toy(20, seed=5)
    alone = weights_of(images, method="crt", second_stage_fraction=0.2)
    assert same(alone, weights_of(images.add(*extra), method="crt", second_stage_fraction=0.2, real_only_fraction=1.0))
    assert not same(alone, weights_of(images.add(*extra), method="crt", second_stage_fraction=0.2))


def test_images_that_choose_tau_are_never_trained_on() -> None:
    pixels, labels = toy(60)
    images = real_images(pixels, labels)
    held = _held_out(images, 3, section(tau_norm_holdout=0.2), seed=0)
    assert np.bincount(labels[held]).tolist() == [4, 4, 4]
    changed = pixels.copy()
    changed[held] = 255 - changed[held]
    before, after = (weights_of(i, method="tau_norm", tau_norm_holdout=0.2) for i in (images, real_images(changed, labels)))
    assert all(torch.equal(before[name], after[name]) for name in before if "classifier" not in name)


def test_logits_of_ldam_are_cosines_times_its_scale() -> None:
    model = train_recognizer(long_tailed(), 3, section(train_steps=2, ldam_scale=7.0), "ldam_drw", seed=0)
    f = torch.from_numpy(features(model, toy(5)[0]))
    cosines = torch.nn.functional.cosine_similarity(f[:, None], model.classifier.weight[None], dim=2)
    torch.testing.assert_close(model.classifier(f), 7.0 * cosines)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    images, checkpoint = real_images(*toy(9)), tmp_path / "c.safetensors"
    train_recognizer(images, 3, section(train_steps=2, save_every_steps=1), "cross_entropy", 0, checkpoint=checkpoint)
    with pytest.raises(DataError, match="does not fit"):
        train_recognizer(images, 4, section(train_steps=2, save_every_steps=1), "cross_entropy", 0, checkpoint=checkpoint)


def test_no_checkpoint_is_written_unless_the_recipe_says_how_often(tmp_path: Path) -> None:
    train_recognizer(real_images(*toy(9)), 3, section(train_steps=2), "cross_entropy", 0, checkpoint=tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())


def test_cosines_are_not_rounded_to_bf16() -> None:
    classifier = NormalizedLinear(torch.nn.Linear(64, 10), scale=30.0)
    f = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = classifier(f)
    assert torch.equal(rounded, classifier(f))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_the_toy_set_on_a_gpu_in_bf16(method: Method, tmp_path: Path) -> None:
    gpu, chosen = torch.device("cuda"), section(train_steps=80, second_stage_fraction=0.25, precision="bf16", save_every_steps=30)
    model = train_recognizer(long_tailed(), 3, chosen, method, 1, gpu, checkpoint=tmp_path / "c.safetensors")
    again = train_recognizer(long_tailed(), 3, chosen, method, 1, gpu, checkpoint=tmp_path / "c.safetensors")  # from the last step
    pixels, labels = toy(90, seed=9)
    assert (predict(model, pixels) == labels).mean() > 0.9
    assert (predict(again, pixels) == predict(model, pixels)).all()
