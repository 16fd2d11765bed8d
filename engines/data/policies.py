"""Augmentation of a recognizer's batches, uint8 to uint8: crop, flip, color jitter, AutoAugment, RandAugment, Cutout.

What is drawn is a pure function of (seed, step, position in the batch), so that batches can be drawn ahead and two recognizers
compared pair by pair. Operations on a whole image are Pillow's own, as in the code that the policies were published with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from engines.data.batches import generator
from engines.recipe import RecognizerSection

Draws: TypeAlias = npt.NDArray[np.float64]  # uniform in [0, 1)
Step: TypeAlias = tuple[str, float, int]  # operation, probability, magnitude 0..9 (0 where the operation has none)
SubPolicy: TypeAlias = tuple[Step, Step]

GRAY = 128  # of holes, and of what an image moved away from: the middle of the range, 0 to the network
MAX_ASPECT = 4 / 3  # of a random resized crop, wide or high
CROP_TRIES = 10  # sizes drawn before the whole image is taken
POLICY_LEVELS = 9  # AutoAugment's magnitudes run from 0 to this
RANDAUGMENT_LEVELS = 30  # RandAugment's
_AUGMENTATION = 1  # the stream of crops and flips under a seed


def augment_batch(pixels: Tensor, section: RecognizerSection, seed: int, step: int) -> Tensor:
    """A step's batch as the recipe has it augmented: crop and flip, then color jitter, policy and Cutout.

    Args:
        pixels: (B, C, H, W) uint8, C = 1 or 3; on any device, though `through_pillow` ones make a detour over the CPU.
        seed, step: all that the draws depend on, beside the position in the batch.

    Returns: (B, C, H, W) uint8, on the same device.
    """
    pixels = _crop_and_flip(pixels, section, seed, step)
    if through_pillow(section):
        pixels = _each_image(pixels, section, seed, step)
    if section.cutout_px:
        draws = generator(seed, "cutout", step).random((len(pixels), section.cutout_holes, 2))
        pixels = cut_out(pixels, section.cutout_px, draws)
    return pixels


def through_pillow(section: RecognizerSection) -> bool:
    """Whether images are augmented one by one on the CPU: slow enough to be done ahead by another thread."""
    return section.policy != "none" or section.color_jitter > 0 or section.crop == "resized"


def cut_out(pixels: Tensor, side_px: int, draws: Draws) -> Tensor:
    """Gray squares, each centered anywhere in its image and cut off by its borders (DeVries & Taylor 2017).

    Args:
        pixels: (B, C, H, W) uint8.
        side_px: s; a center at row r takes rows r - floor(s / 2) to r - floor(s / 2) + s - 1.
        draws: (B, holes, 2), of the centers' rows and columns.
    """
    height, width = pixels.shape[2:]
    first = torch.from_numpy((draws * (height, width)).astype(np.int64)).to(pixels.device) - side_px // 2  # (B, holes, 2)
    rows = torch.arange(height, device=pixels.device) - first[..., :1]  # (B, holes, H), 0 at a hole's first row
    columns = torch.arange(width, device=pixels.device) - first[..., 1:]  # (B, holes, W)
    holes = ((rows >= 0) & (rows < side_px))[..., None] & ((columns >= 0) & (columns < side_px))[..., None, :]  # (B, holes, H, W)
    return pixels.masked_fill(holes.any(1)[:, None], GRAY)


def crop_boxes(size_px: int, min_area: float, draws: Draws) -> npt.NDArray[np.int64]:
    """Random resized crops of square images (Szegedy et al. 2015): parts of an area uniform in min_area to 1, their log aspect uniform.

    Args:
        draws: (B, 2 * CROP_TRIES + 2): area and aspect of each try, then the place.

    Returns: (B, 4) left, top, right, bottom; of the first try that fits into the image, or else the whole image.
    """
    tries = draws[:, :-2].reshape(len(draws), CROP_TRIES, 2)
    area = (min_area + (1.0 - min_area) * tries[..., 0]) * size_px**2
    aspect = MAX_ASPECT ** (2.0 * tries[..., 1] - 1.0)
    sides = np.sqrt(area[..., None] * np.stack([aspect, 1.0 / aspect], -1)).round().clip(1)  # (B, tries, 2) width, height
    fits = sides.max(-1) <= size_px  # (B, tries)
    chosen = sides[np.arange(len(draws)), fits.argmax(1)]  # (B, 2)
    chosen[~fits.any(1)] = size_px
    corner = np.floor(draws[:, -2:] * (size_px - chosen + 1))  # (B, 2) left, top
    return np.concatenate([corner, corner + chosen], 1).astype(np.int64)


def jittered(image: Image.Image, strength: float, draws: Draws) -> Image.Image:
    """Brightness, contrast and saturation scaled by 1 - strength to 1 + strength each, in random order; draws (6,)."""
    for which in draws[3:].argsort():
        image = _ENHANCERS[which](image).enhance(1.0 + strength * (2.0 * float(draws[which]) - 1.0))
    return image


def auto_augmented(image: Image.Image, policy: tuple[SubPolicy, ...], draws: Draws) -> Image.Image:
    """One sub-policy of an AutoAugment policy, at random (Cubuk et al. 2019); draws (5,): which, then chance and sign of each step."""
    for (name, probability, level), (chance, sign) in zip(policy[int(draws[0] * len(policy))], draws[1:].reshape(2, 2), strict=True):
        if chance < probability:
            image = operate(image, name, level / POLICY_LEVELS, sign < 0.5)
    return image


def rand_augmented(image: Image.Image, magnitude: int, draws: Draws) -> Image.Image:
    """Random operations one after another, all of one magnitude, 0..30 (Cubuk et al. 2020); draws (n, 2): which, and its sign."""
    for which, sign in draws:
        image = operate(image, RANDAUGMENT[int(which * len(RANDAUGMENT))], magnitude / RANDAUGMENT_LEVELS, sign < 0.5)
    return image


def operate(image: Image.Image, name: str, level: float, negative: bool = False) -> Image.Image:
    """An operation of `OPERATIONS` at a level of 0..1 of its range; the other way where it has one and `negative` says so."""
    return OPERATIONS[name](image, -level if negative else level)


def _crop_and_flip(pixels: Tensor, section: RecognizerSection, seed: int, step: int) -> Tensor:
    """Random crop of the black-padded images unless crops are "resized", random horizontal flip where the recipe says so."""
    count, _, height, width = pixels.shape
    random = np.random.default_rng([seed, _AUGMENTATION, step])
    pad = section.crop_padding_px if section.crop == "pad" else 0
    if pad:
        top, left = (torch.from_numpy(random.integers(0, 2 * pad + 1, count)).to(pixels.device) for _ in range(2))  # (B,)
        rows = top[:, None] + torch.arange(height, device=pixels.device)  # (B, H)
        columns = left[:, None] + torch.arange(width, device=pixels.device)  # (B, W)
        padded = F.pad(pixels, (pad, pad, pad, pad))
        which = torch.arange(count, device=pixels.device)[:, None, None]
        pixels = padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W)
    if section.horizontal_flip:
        flip = torch.from_numpy(random.random(count) < 0.5).to(pixels.device)
        pixels = torch.where(flip[:, None, None, None], pixels.flip(3), pixels)
    return pixels


def _each_image(pixels: Tensor, section: RecognizerSection, seed: int, step: int) -> Tensor:
    """What is done to images one by one, by Pillow: resized crop, color jitter, policy."""
    images = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()  # (B, H, W, C)
    count, height, width, channels = images.shape
    assert height == width and channels in (1, 3)
    changes = [*_crops(section, height, count, seed, step), *_jitters(section, count, seed, step), *_policies(section, count, seed, step)]
    augmented = np.empty_like(images)
    for i in range(count):
        image = Image.fromarray(images[i] if channels == 3 else images[i, :, :, 0])
        for change in changes:
            image = change(image, i)
        augmented[i] = np.asarray(image).reshape(height, width, channels)
    return torch.from_numpy(augmented).permute(0, 3, 1, 2).contiguous().to(pixels.device)


Change: TypeAlias = Callable[[Image.Image, int], Image.Image]  # of the image at a position of the batch


def _crops(section: RecognizerSection, size_px: int, count: int, seed: int, step: int) -> list[Change]:
    if section.crop != "resized":
        return []
    draws = generator(seed, "resized crop", step).random((count, 2 * CROP_TRIES + 2))
    boxes = [tuple(box) for box in crop_boxes(size_px, section.crop_min_area, draws).tolist()]
    return [lambda image, i: image.resize((size_px, size_px), Image.Resampling.BILINEAR, boxes[i])]


def _jitters(section: RecognizerSection, count: int, seed: int, step: int) -> list[Change]:
    if not section.color_jitter:
        return []
    draws = generator(seed, "color jitter", step).random((count, 6))
    return [lambda image, i: jittered(image, section.color_jitter, draws[i])]


def _policies(section: RecognizerSection, count: int, seed: int, step: int) -> list[Change]:
    if section.policy == "none":
        return []
    random = generator(seed, section.policy, step)
    if section.policy == "randaugment":
        draws = random.random((count, section.randaugment_ops, 2))
        return [lambda image, i: rand_augmented(image, section.randaugment_magnitude, draws[i])]
    draws, policy = random.random((count, 5)), AUTOAUGMENT[section.policy]
    return [lambda image, i: auto_augmented(image, policy, draws[i])]


def _fill(image: Image.Image) -> int | tuple[int, int, int]:
    return GRAY if image.mode == "L" else (GRAY, GRAY, GRAY)


def _affine(image: Image.Image, matrix: tuple[float, ...], resample: Image.Resampling) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=_fill(image))


def _shear_x(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, (1.0, 0.3 * level, 0.0, 0.0, 1.0, 0.0), Image.Resampling.BICUBIC)


def _shear_y(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, (1.0, 0.0, 0.0, 0.3 * level, 1.0, 0.0), Image.Resampling.BICUBIC)


def _translate_x(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, (1.0, 0.0, round(150 / 331 * level * image.width), 0.0, 1.0, 0.0), Image.Resampling.NEAREST)


def _translate_y(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, (1.0, 0.0, 0.0, 0.0, 1.0, round(150 / 331 * level * image.height)), Image.Resampling.NEAREST)


def _rotate(image: Image.Image, level: float) -> Image.Image:
    return image.rotate(30.0 * level, Image.Resampling.BICUBIC, fillcolor=_fill(image))


def _enhance(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, level: enhancer(image).enhance(1.0 + 0.9 * level)


_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {  # levels -1..1; what has no other way takes their size
    "identity": lambda image, _: image,
    "shear_x": _shear_x,  # up to 0.3
    "shear_y": _shear_y,
    "translate_x": _translate_x,  # up to 150 of 331 px, of which the policies were found
    "translate_y": _translate_y,
    "rotate": _rotate,  # up to 30 degrees
    "color": _enhance(ImageEnhance.Color),  # saturation by 0.1 to 1.9, and so on
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "posterize": lambda image, level: ImageOps.posterize(image, 8 - round(4 * abs(level))),  # to 4 bits
    "solarize": lambda image, level: ImageOps.solarize(image, round(256 * (1.0 - abs(level)))),  # inverts what is as bright
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "invert": lambda image, _: ImageOps.invert(image),
}
RANDAUGMENT = tuple(name for name in OPERATIONS if name != "invert")  # the fourteen

_CIFAR10: tuple[SubPolicy, ...] = (  # Cubuk et al. 2019, appendix: the 25 sub-policies found on CIFAR-10
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 0), ("autocontrast", 0.4, 0)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("autocontrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 0)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 0)),
)
_IMAGENET: tuple[SubPolicy, ...] = (  # and on ImageNet
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 0), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 0)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 0)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 0), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("color", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 0)),
    (("equalize", 0.0, 0), ("equalize", 0.8, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("color", 1.0, 2)),
    (("color", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 0)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 0)),
    (("color", 0.4, 0), ("equalize", 0.6, 0)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
)
AUTOAUGMENT: dict[Literal["autoaugment-cifar10", "autoaugment-imagenet"], tuple[SubPolicy, ...]] = {
    "autoaugment-cifar10": _CIFAR10,
    "autoaugment-imagenet": _IMAGENET,
}
