"""Augmentation policies: operations against arithmetic by hand, draws that depend on seed, step and position alone, the sizes of holes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engines.data.policies import (
    AUTOAUGMENT,
    CROP_TRIES,
    GRAY,
    OPERATIONS,
    RANDAUGMENT,
    augment_batch,
    auto_augmented,
    crop_boxes,
    cut_out,
    jittered,
    operate,
    rand_augmented,
    through_pillow,
)
from engines.errors import UsageError
from engines.recipe import RecognizerSection, load

PLAIN: dict[str, Any] = {"crop_padding_px": 0, "horizontal_flip": False}
EVERYTHING: dict[str, Any] = {"crop": "resized", "color_jitter": 0.4, "cutout_px": 5, "cutout_holes": 2}
WITHOUT_A_LEVEL = {"autocontrast", "equalize", "invert"}


def pictures(count: int, channels: int = 3, size_px: int = 16, seed: int = 0) -> torch.Tensor:
    """(B, C, H, W) uint8: a slope with noise, as photographs have few extremes."""
    random = np.random.default_rng(seed)
    slope = np.add.outer(np.arange(size_px), 2 * np.arange(size_px)) * 160 // (3 * size_px)
    return torch.from_numpy((slope + random.integers(20, 90, (count, channels, size_px, size_px))).astype(np.uint8))


def image(channels: int = 3) -> Image.Image:
    values = pictures(1, channels)[0].permute(1, 2, 0).numpy()
    return Image.fromarray(values if channels == 3 else values[:, :, 0])


def values(of: Image.Image) -> np.ndarray:
    return np.asarray(of).astype(np.int64)


def augmented(pixels: torch.Tensor, seed: int = 0, step: int = 0, **changes: Any) -> torch.Tensor:
    return augment_batch(pixels, RecognizerSection(**changes), seed, step)


# Crop and flip


def test_an_augmented_image_is_a_shifted_one_bordered_with_black() -> None:
    pixels = torch.randint(1, 255, (64, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shifted = augmented(pixels, crop_padding_px=2, horizontal_flip=False)
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2))
    places = set()
    for before, after in zip(padded, shifted, strict=True):
        fits = [(i, j) for i in range(5) for j in range(5) if torch.equal(before[:, i : i + 8, j : j + 8], after)]
        assert len(fits) == 1
        places.update(fits)
    assert len(places) > 15


def test_crops_and_flips_are_those_that_earlier_recognizers_were_trained_with() -> None:
    pixels, random = pictures(40), np.random.default_rng([7, 1, 12])  # seed, stream, step
    top, left, flip = random.integers(0, 9, 40), random.integers(0, 9, 40), random.random(40) < 0.5
    by_hand = []
    for i, picture in enumerate(torch.nn.functional.pad(pixels, (4, 4, 4, 4))):
        cropped = picture[:, top[i] : top[i] + 16, left[i] : left[i] + 16]
        by_hand.append(cropped.flip(2) if flip[i] else cropped)
    assert torch.equal(augmented(pixels, seed=7, step=12), torch.stack(by_hand))


def test_a_flip_is_the_recipe_s_choice_and_takes_about_half_of_the_images() -> None:
    pixels = torch.randint(0, 255, (200, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(augmented(pixels, **PLAIN), pixels)
    flipped = augmented(pixels, crop_padding_px=0)
    kept, turned = (flipped == pixels).flatten(1).all(1), (flipped == pixels.flip(3)).flatten(1).all(1)
    assert (kept | turned).all()
    assert 70 < turned.sum() < 130


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 256), st.floats(0.01, 1.0), st.integers(0, 2**32 - 1))
def test_a_resized_crop_lies_in_the_image_and_has_the_area_and_aspect_that_it_may(size_px: int, min_area: float, seed: int) -> None:
    boxes = crop_boxes(size_px, min_area, np.random.default_rng(seed).random((50, 2 * CROP_TRIES + 2)))
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= size_px).all()
    wide, high = (boxes[:, 2:] - boxes[:, :2]).T
    assert (wide >= 1).all() and (high >= 1).all()
    assert ((wide + 0.5) * (high + 0.5) >= min_area * size_px**2 * (1 - 1e-9)).all()  # each side was rounded
    assert ((wide - 0.5) / (high + 0.5) <= 4 / 3).all() and ((high - 0.5) / (wide + 0.5) <= 4 / 3).all()


def test_areas_of_resized_crops_are_uniform_where_every_size_fits() -> None:
    boxes = crop_boxes(1000, 0.08, np.random.default_rng(0).random((4000, 2 * CROP_TRIES + 2)))
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) / 1000**2
    small = area[area < 0.5]  # sides up to 0.82 of the image: never refused
    assert area.min() >= 0.079
    np.testing.assert_allclose(np.quantile(small, [0.25, 0.5, 0.75]), 0.08 + 0.42 * np.array([0.25, 0.5, 0.75]), atol=0.02)


def test_the_whole_image_is_taken_where_no_try_fits() -> None:
    draws = np.tile([0.999, 0.999], CROP_TRIES).tolist()
    assert crop_boxes(32, 1.0, np.array([[*draws, 0.7, 0.7]])).tolist() == [[0, 0, 32, 32]]


def test_a_resized_crop_of_a_flat_image_is_flat_and_of_a_slope_a_flatter_slope() -> None:
    slope = (torch.arange(16, dtype=torch.uint8) * 10)[None, None, None].expand(20, 3, 16, 16).contiguous()
    cropped = augmented(slope, horizontal_flip=False, crop="resized", crop_min_area=0.2).int()
    steps = cropped[..., 1:] - cropped[..., :-1]
    assert steps.min() >= 0 and steps.max() <= 11
    assert steps.float().mean() < 9
    assert torch.equal(cropped[:, :, :1].expand_as(cropped), cropped)


# Operations


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_an_operation_keeps_size_and_mode_and_at_level_0_the_image(name: str, channels: int) -> None:
    before = image(channels)
    for level in (0.0, 0.5, 1.0):
        for negative in (False, True):
            after = operate(before, name, level, negative)
            assert (after.mode, after.size) == (before.mode, before.size)
            if not level and name not in WITHOUT_A_LEVEL:
                assert (values(after) == values(before)).all()


def test_operations_of_the_values_are_their_arithmetic() -> None:
    x, before = values(image()), image()
    assert (values(operate(before, "invert", 0.0)) == 255 - x).all()
    assert (values(operate(before, "posterize", 1.0)) == x // 16 * 16).all()  # 4 bits
    assert (values(operate(before, "posterize", 7 / 9)) == x // 8 * 8).all()  # 8 - round(3.1) = 5 bits
    assert (values(operate(before, "solarize", 1.0)) == 255 - x).all()
    assert (values(operate(before, "solarize", 0.5)) == np.where(x >= 128, 255 - x, x)).all()
    darker = values(operate(before, "brightness", 5 / 9, negative=True))
    np.testing.assert_allclose(darker, 0.5 * x, atol=1)
    gray = x @ [0.299, 0.587, 0.114]
    saturated = values(operate(before, "color", 5 / 9))
    np.testing.assert_allclose(saturated, (gray[..., None] + 1.5 * (x - gray[..., None])).clip(0, 255), atol=2)
    contrasted = values(operate(before, "contrast", 5 / 9))
    np.testing.assert_allclose(contrasted, (gray.mean() + 1.5 * (x - gray.mean())).clip(0, 255), atol=2)
    low, high = x.min((0, 1)), x.max((0, 1))
    np.testing.assert_allclose(values(operate(before, "autocontrast", 0.0)), (x - low) * 255 / (high - low), atol=1)


def test_equalizing_makes_the_shares_of_dark_and_bright_equal() -> None:
    flat = values(operate(image(1), "equalize", 0.0))
    assert abs(np.median(flat) - 127.5) < 8
    assert flat.min() == 0 and flat.max() > 250


def test_a_translation_moves_whole_pixels_and_leaves_gray() -> None:
    x = values(image())
    px = round(150 / 331 * 16)
    assert px == 7
    moved = values(operate(image(), "translate_x", 1.0))
    assert (moved[:, :-px] == x[:, px:]).all()
    assert (moved[:, -px:] == GRAY).all()
    down = values(operate(image(), "translate_y", 1.0, negative=True))
    assert (down[px:] == x[:-px]).all()
    assert (down[:px] == GRAY).all()


def test_a_shear_moves_each_row_by_its_share_and_a_rotation_turns_by_degrees() -> None:
    ramp = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8) * 8 + 64, (16, 1)))  # brighter by 8 a column
    sheared = values(operate(ramp, "shear_x", 1.0))
    rows, columns = np.indices((16, 16))
    source = columns + 0.3 * (rows + 0.5)
    known = (source < 14) & (columns > 0)
    np.testing.assert_allclose(sheared[known], (source * 8 + 64)[known], atol=1.5)
    turned = values(operate(ramp, "rotate", 1.0))
    rows, cols = np.indices((16, 16)) - 7.5
    source = math.cos(math.radians(30)) * cols - math.sin(math.radians(30)) * rows  # counterclockwise, as Pillow turns
    middle = rows**2 + cols**2 < 36
    np.testing.assert_allclose(turned[middle], (source * 8 + 7.5 * 8 + 64)[middle], atol=2)


# Policies


@pytest.mark.parametrize("policy", sorted(AUTOAUGMENT))
def test_a_policy_has_25_pairs_of_known_operations(policy: Any) -> None:
    assert len(AUTOAUGMENT[policy]) == 25
    for name, probability, level in (step for pair in AUTOAUGMENT[policy] for step in pair):
        assert name in OPERATIONS
        assert 0 <= probability <= 1 and round(10 * probability, 9) % 1 == 0
        assert level in range(10) and not (level and name in WITHOUT_A_LEVEL)


def test_randaugment_chooses_among_fourteen_operations() -> None:
    assert len(set(RANDAUGMENT)) == 14
    assert "identity" in RANDAUGMENT


def test_a_step_is_taken_below_its_probability_and_its_sign_is_drawn() -> None:
    before, policy = image(), ((("rotate", 0.7, 9), ("posterize", 0.3, 9)),)
    neither, first, second = [0.0, 0.71, 0.9, 0.31, 0.9], [0.0, 0.69, 0.9, 0.31, 0.9], [0.0, 0.71, 0.9, 0.29, 0.9]
    assert (values(auto_augmented(before, policy, np.array(neither))) == values(before)).all()
    assert (values(auto_augmented(before, policy, np.array(first))) == values(operate(before, "rotate", 1.0))).all()
    assert (values(auto_augmented(before, policy, np.array(second))) == values(operate(before, "posterize", 1.0))).all()
    both = auto_augmented(before, policy, np.array([0.9, 0.0, 0.1, 0.0, 0.9]))
    assert (values(both) == values(operate(operate(before, "rotate", 1.0, negative=True), "posterize", 1.0))).all()


def test_every_sub_policy_is_chosen_by_an_equal_share_of_the_draws() -> None:
    black = Image.new("RGB", (1, 1))
    policy = tuple((("brightness", 0.0, 0), ("invert", float(i == 7), 0)) for i in range(25))
    shares = np.arange(0, 1, 0.01)
    chosen = [auto_augmented(black, policy, np.array([u, 0.5, 0.5, 0.5, 0.5])).getpixel((0, 0)) != (0, 0, 0) for u in shares]
    assert [i for i, it_was in enumerate(chosen) if it_was] == [28, 29, 30, 31]


def test_randaugment_applies_its_operations_in_the_order_drawn() -> None:
    before, names = image(), ("rotate", "color", "posterize")
    draws = np.array([[(RANDAUGMENT.index(name) + 0.5) / 14, sign] for name, sign in zip(names, (0.1, 0.9, 0.9), strict=True)])
    by_hand = operate(operate(operate(before, "rotate", 0.3, negative=True), "color", 0.3), "posterize", 0.3)
    assert (values(rand_augmented(before, 9, draws)) == values(by_hand)).all()


def test_jitter_of_strength_0_is_nothing_and_its_order_is_drawn() -> None:
    before = image()
    assert (values(jittered(before, 0.0, np.random.default_rng(0).random(6))) == values(before)).all()
    factors = [0.9, 0.9, 0.9]  # times 1.32 each
    bright_first, bright_last = (values(jittered(before, 0.4, np.array([*factors, *order]))) for order in ([0, 0.5, 0.9], [0.9, 0, 0.5]))
    assert (bright_first != bright_last).any()
    only_bright = values(jittered(before, 0.4, np.array([0.75, 0.5, 0.5, 0.1, 0.2, 0.3])))
    np.testing.assert_allclose(only_bright, (1.2 * values(before)).clip(0, 255), atol=1)


@pytest.mark.parametrize("policy", ["none", "autoaugment-cifar10", "autoaugment-imagenet", "randaugment"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_keeps_shape_and_type_and_depends_on_seed_and_step_alone(policy: str, channels: int) -> None:
    pixels = pictures(24, channels)
    changes = EVERYTHING | {"policy": policy}
    first = augmented(pixels, 3, 5, **changes)
    assert (first.shape, first.dtype) == (pixels.shape, torch.uint8)
    augmented(pixels, 3, 6, **changes)
    assert torch.equal(augmented(pixels, 3, 5, **changes), first)
    for other in (augmented(pixels, 3, 6, **changes), augmented(pixels, 4, 5, **changes)):
        assert (other != first).flatten(1).any(1).all()


@pytest.mark.parametrize("policy", ["autoaugment-cifar10", "randaugment"])
def test_how_an_image_is_augmented_does_not_depend_on_the_images_around_it(policy: str) -> None:
    pixels, others = pictures(12), pictures(12, seed=1)
    changes = EVERYTHING | {"policy": policy}
    alone = augmented(torch.cat([pixels[:6], others[6:]]), **changes)
    assert torch.equal(alone[:6], augmented(pixels, **changes)[:6])
    assert torch.equal(alone[:6], augmented(pixels[:6], **changes))  # nor on how many there are


def test_only_what_pillow_does_is_worth_a_thread() -> None:
    assert not through_pillow(RecognizerSection(cutout_px=16))
    for changes in ({"policy": "randaugment"}, {"color_jitter": 0.1}, {"crop": "resized"}):
        assert through_pillow(RecognizerSection(**changes))


# Cutout


def test_a_hole_in_the_middle_is_a_square_of_its_side_and_one_in_a_corner_a_quarter() -> None:
    pixels = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    cut = cut_out(pixels, 16, np.array([[[0.5, 0.5]], [[0.0, 0.0]], [[0.999, 0.5]]]))
    assert (cut[0, :, 8:24, 8:24] == GRAY).all()
    assert (cut == GRAY).flatten(2).sum(2).tolist() == [[256] * 3, [64] * 3, [9 * 16] * 3]
    assert ((cut == GRAY) | (cut == 0)).all()


def test_each_image_has_its_own_holes_and_two_may_overlap() -> None:
    pixels = torch.zeros(2, 1, 10, 10, dtype=torch.uint8)
    cut = cut_out(pixels, 2, np.array([[[0.2, 0.2], [0.2, 0.7]], [[0.5, 0.5], [0.55, 0.55]]]))
    assert (cut == GRAY).flatten(1).sum(1).tolist() == [8, 4]
    assert torch.equal(augmented(pixels, **PLAIN), pixels)
    assert (augmented(pixels, **PLAIN, cutout_px=2) == GRAY).any()


def test_holes_of_a_recipe_cover_what_squares_centered_anywhere_cover() -> None:
    share = (augmented(torch.zeros(2000, 1, 32, 32, dtype=torch.uint8), **PLAIN, cutout_px=16) == GRAY).float().mean()
    side = sum(min(32, center + 8) - max(0, center - 8) for center in range(32)) / 32  # the mean side
    assert float(share) == pytest.approx((side / 32) ** 2, abs=0.005)


def test_a_hole_as_large_as_the_image_is_refused() -> None:
    with pytest.raises(UsageError, match=r"recognizer\.cutout_px 32 is not smaller than data\.image_size_px 32"):
        load('name = "x"', ["recognizer.cutout_px=32"])
    load('name = "x"', ["recognizer.cutout_px=31"])
