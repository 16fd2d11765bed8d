"""Does L_pair do what it claims? A source model of seven digits is adapted to five images of an eighth, with and without it.

`python tests/toy_pair_diversity.py [FOLDER]` adapts to digits 7, 8 and 9 and to two choices of five images each, prints a table
(mean and sample deviation over the six), and writes the picture, the figures and the source model to FOLDER (default:
runs/pair-diversity). Eleven minutes of one CPU core; what it showed is in docs/results/pair-diversity.md.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.svm import SVC
from torch import Tensor

from diffrc_cli import console
from diffrc_cli.recipe import embedded
from engines import store
from engines.data.batches import by_class, generator, to_pixels
from engines.data.decode import Frame, Pixels
from engines.data.images import ArrayReader, ImageSet, Shelf
from engines.data.longtail import LongTail
from engines.data.sources import load as load_images
from engines.diffusion.noise import batch_noise, image_key
from engines.diffusion.sampler import sample
from engines.diffusion.schedule import make_schedule, respace
from engines.networks.unet import UNet
from engines.recipe import Recipe, load
from engines.training.diffusion import build_unet
from engines.training.loop import train
from engines.training.source import source_stage
from engines.training.target import target_stage

CPU = torch.device("cpu")
HEAD = (0, 1, 2, 3, 4, 5, 6)  # the digits of the source model
CASES = [(digit, choice) for digit in (7, 8, 9) for choice in (0, 1)]  # the tail digit, and which five of its images
TAIL_IMAGES = 5
GENERATED, STEPS = 100, 50  # images of each adapted model, DDPM steps; the same noise for all

SETTINGS = (  # of digits-lt, for the paper's unconditional model on this toy
    "unet.class_cond=false",
    "unet.dropout=0.0",
    "source.train_on=head",
    "source.warmup_steps=50",
    "source.sample_every_steps=0",
    "source.save_every_steps=1000",
    "target.adapt_on=medium+few",
    "target.train_steps=300",
    "target.batch_size=20",
    "target.group_size=5",
    "target.lr_decay=none",
    "target.warmup_steps=20",
    "target.ema_decay=0.99",
    "target.sample_every_steps=0",
    "target.save_every_steps=100000",
)


@dataclass(frozen=True)
class Arm:
    """One way to adapt."""

    name: str
    settings: tuple[str, ...]


ARMS = (
    Arm("without L_pair", ("target.lambda_pair=0.0",)),
    Arm("L_pair as printed", ()),
    Arm("L_pair, temperature 0.1", ("target.pair_temperature=0.1",)),
    Arm("without L_pair, 50 steps only", ("target.lambda_pair=0.0", "target.train_steps=50")),
)
SHOWN = (0, 1, 2)  # in the picture

Vectors = npt.NDArray[np.float64]


def recipe_of(*settings: str) -> Recipe:
    return load(embedded()["digits-lt"].read_text(encoding="utf-8"), (*SETTINGS, *settings))


@cache
def digits() -> tuple[ImageSet, ImageSet]:
    return load_images(recipe_of().data, None)


def long_tail(digit: int, choice: int) -> tuple[LongTail, ImageSet]:
    """Every training image of the head digits and five of `digit`; and the images of `digit` that were not chosen."""
    pool, test = digits()
    members = by_class(pool.labels, 10)
    order = generator(choice, "pair-diversity", digit).permutation(members[digit])
    five, unseen = np.sort(order[:TAIL_IMAGES]), np.sort(order[TAIL_IMAGES:])
    chosen = [*(members[k] for k in HEAD), five]
    labels = np.concatenate([np.full(len(part), k, dtype=np.int64) for k, part in enumerate(chosen)])
    names = tuple(pool.names[k] for k in (*HEAD, digit))
    train_set = ImageSet(labels, names, Shelf(ArrayReader(pool.pixels(np.concatenate(chosen)), "the digits"), Frame(8, 1)))
    groups = (*("many",) * len(HEAD), "few")
    return LongTail(train_set, test, train_set, np.bincount(labels), groups, ""), pool.subset(unseen)  # type: ignore[arg-type]


def train_source(folder: Path) -> UNet:
    """Eq. 5 on the head digits; done once for all cases, since it sees no tail image."""
    recipe = recipe_of()
    torch.manual_seed(recipe.seed)
    unet = build_unet(recipe, len(HEAD) + 1)
    with console.progress() as report:
        train(source_stage(recipe, long_tail(*CASES[0])[0], unet, CPU), folder / "source", recipe.seed, CPU, report)
    return unet


def adapt(source: UNet, data: LongTail, recipe: Recipe) -> tuple[UNet, dict[str, float]]:
    """Eq. 10, and the last logged figures of the loss."""
    frozen, target = (build_unet(recipe, len(data.counts)) for _ in range(2))
    for network in (frozen, target):
        network.load_state_dict(source.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        train(target_stage(recipe, data, frozen, target, CPU), Path(folder), recipe.seed, CPU)
        return target, dict(store.read_json_lines(Path(folder) / "metrics.jsonl")[-1])


@torch.no_grad()
def generate(unet: UNet, count: int = GENERATED, steps: int = STEPS) -> Pixels:
    """(count, 8, 8, 1) uint8, unguided; image i starts from the same noise whatever the network."""
    schedule = respace(make_schedule("cosine", 1000), steps)
    keys = [image_key(0, 0, i) for i in range(count)]
    unet.eval()

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = unet(x, t)
        return out

    return to_pixels(sample(denoise, schedule, lambda step: batch_noise(keys, step, (1, 8, 8))))


# ---------------------------------------------------------------------------------------------------------------- measures


def measures(images: Pixels, five: Pixels, unseen: Pixels, copy_ratio: float) -> dict[str, float]:
    """How varied generated images are and how near the real ones; distances are Euclidean, of pixels in 0..1.

    "diversity"  mean distance between two generated images
    "nearest"    mean distance to the nearest of the five
    "copies"     share whose nearest of the five is at most `copy_ratio` times as far as the second nearest
    "coverage"   mean distance of an unseen real image of the digit to the nearest generated one: smaller is better
    """
    x, real, others = (vectors(part) for part in (images, five, unseen))
    to_five = np.sort(distances(x, real), axis=1)
    return {
        "diversity": mean_pair_distance(x),
        "nearest": float(to_five[:, 0].mean()),
        "copies": float(copies(images, five, copy_ratio).mean()),
        "coverage": float(distances(others, x).min(1).mean()),
    }


def copies(images: Pixels, five: Pixels, copy_ratio: float) -> npt.NDArray[np.bool_]:
    """(N,) whether an image lies on one of the five rather than between them."""
    to_five = np.sort(distances(vectors(images), vectors(five)), axis=1)
    return np.asarray(to_five[:, 0] <= copy_ratio * to_five[:, 1])


def vectors(pixels: Pixels) -> Vectors:
    return pixels.reshape(len(pixels), -1).astype(np.float64) / 255


def distances(a: Vectors, b: Vectors) -> Vectors:
    return np.asarray(np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1)))


def mean_pair_distance(x: Vectors) -> float:
    return float(distances(x, x).sum() / (len(x) * (len(x) - 1)))


@cache
def oracle() -> SVC:
    """Tells the digits apart; it has seen every training image, of the tail too, and only reports."""
    pool, _ = digits()
    return SVC(C=10, gamma=0.05).fit(vectors(pool.pixels(np.arange(len(pool)))), pool.labels)


# ----------------------------------------------------------------------------------------------------------------- results


def mean_and_deviation(values: Sequence[float], percent: bool = False) -> str:
    scale, places = (100, 0) if percent else (1, 2)
    return f"{scale * np.mean(values):.{places}f} ± {scale * np.std(values, ddof=1):.{places}f}"


def picture(shown: Mapping[int, tuple[Pixels, Sequence[Pixels]]], copy_ratio: float, per_row: int = 7) -> bytes:
    """PNG: a block a digit; the five real images, then two rows of each arm's, copies framed."""
    tile, gap, frame, split, margin, top = 32, 6, 2, 20, 16, 62
    step, font = tile + gap, ImageFont.load_default(size=14)
    lefts = [margin + 28]
    for columns in (3, *(per_row,) * len(SHOWN)):
        lefts.append(lefts[-1] + columns * step + split)
    canvas = Image.new("RGB", (lefts[-1] - split + margin, top + len(shown) * (2 * step + split) - split + margin), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text(
        (lefts[0], 18), "Red: a copy of one of the five. Each place starts from the same noise in every column.", "#5a6472", font, "lm"
    )
    for left, words in zip(lefts, ("the five", *(ARMS[i].name for i in SHOWN)), strict=False):
        draw.text((left, 44), words, "#1b2330", font, "lm")
    for block, (digit, (five, of_arms)) in enumerate(shown.items()):
        y = top + block * (2 * step + split)
        draw.text((margin, y + step - gap / 2), str(digit), "#1b2330", ImageFont.load_default(size=20), "lm")
        for left, images, columns in ((lefts[0], five, 3), *((x, images, per_row) for x, images in zip(lefts[1:], of_arms, strict=False))):
            framed = copies(images, five, copy_ratio) & (images is not five)
            for i, image in enumerate(images[: 2 * columns]):
                at = (left + i % columns * step, y + i // columns * step)
                if framed[i]:
                    draw.rectangle((at[0] - frame, at[1] - frame, at[0] + tile + frame - 1, at[1] + tile + frame - 1), "#e0402f")
                canvas.paste(Image.fromarray(image[:, :, 0]).resize((tile, tile), Image.Resampling.NEAREST), at)
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def main(folder: Path) -> None:
    source = train_source(folder)
    copy_ratio = recipe_of().select.copy_ratio
    figures: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in ARMS}
    shown: dict[int, tuple[Pixels, list[Pixels]]] = {}
    real: dict[str, list[float]] = {"diversity": [], "of five": []}
    for digit, choice in CASES:
        data, unseen = long_tail(digit, choice)
        five = data.train.pixels(np.flatnonzero(data.train.labels == len(HEAD)))
        others = unseen.pixels(np.arange(len(unseen)))
        real["diversity"].append(mean_pair_distance(vectors(others)))
        real["of five"].append(mean_pair_distance(vectors(five)))
        of_arms = []
        for arm in ARMS:
            unet, loss = adapt(source, data, recipe_of(f"seed={choice}", *arm.settings))
            images = generate(unet)
            found = measures(images, five, others, copy_ratio)
            found["purity"] = float((oracle().predict(vectors(images)) == digit).mean())
            found |= {key: loss[key] for key in ("l_base", "l_pair", "entropy_source", "entropy_target") if key in loss}
            figures[arm.name].append(found)
            of_arms.append(images)
            console.say(f"{digit}/{choice}  {arm.name:36s}" + "  ".join(f"{key} {value:.3f}" for key, value in found.items()))
        if choice == 0:
            shown[digit] = (five, [of_arms[i] for i in SHOWN])
    store.write_json(folder / "figures.json", {"real": real, "arms": figures})
    store.write_bytes(folder / "pair-diversity.png", picture(shown, copy_ratio))
    _, test = digits()
    right = (oracle().predict(vectors(test.pixels(np.arange(len(test))))) == test.labels).mean()
    console.say(
        f"real images: {mean_and_deviation(real['diversity'])}; the five: {mean_and_deviation(real['of five'])}; oracle {right:.3f}"
    )
    rows = []
    for name, found in figures.items():
        columns = (("diversity", False), ("nearest", False), ("copies", True), ("coverage", False), ("purity", True))
        rows.append((name, *(mean_and_deviation([f[key] for f in found], percent) for key, percent in columns)))
    console.table("", ("arm", "diversity", "nearest of five", "copies, %", "coverage", "purity, %"), rows)
    console.say(f"kept in: {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/pair-diversity"))
