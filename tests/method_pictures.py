"""The pictures of docs/method.md, drawn from a trained run of the digits: `python tests/method_pictures.py runs/digits-lt docs`."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from engines import store
from engines.data.batches import to_pixels, to_tensor
from engines.data.longtail import LongTail, prepare
from engines.diffusion.noise import batch_noise, image_key
from engines.diffusion.schedule import Schedule, make_schedule, respace
from engines.networks.guide import Guide
from engines.networks.unet import UNet
from engines.training.stages import load_guide, load_unet

TILE_PX, GAP_PX, LABEL_PX, HEADER_PX = 56, 4, 150, 18
SHOWN_T = (0, 100, 200, 300, 400, 500, 600, 700, 800, 999)
STEPS = 10


def main(run_folder: Path, out: Path) -> None:
    """Write method-noise.png and method-sampling.png. Under 10 s on one core."""
    run = store.open_run(run_folder)
    tail = prepare(run.recipe.data, None)
    unet, guide = load_unet(run, "target"), load_guide(run)
    schedule = make_schedule(run.recipe.diffusion.noise_schedule, run.recipe.diffusion.steps)
    with torch.no_grad():
        store.write_bytes(out / "method-noise.png", noise_picture(unet, guide, schedule, tail))
        store.write_bytes(out / "method-sampling.png", sampling_picture(unet, respace(schedule, STEPS), tail))


def noise_picture(unet: UNet, guide: Guide, schedule: Schedule, tail: LongTail) -> bytes:
    """A training image under more and more noise (Eq. 1), what the U-Net takes it for (Eq. 6), and how sure the guide is of its class."""
    label = tail.names.index("five")
    x0 = to_tensor(tail.train.pixels(np.flatnonzero(tail.train.labels == label)[:1]))  # (1, 1, 8, 8)
    noise = batch_noise([image_key(0, label, 0)], 0, (1, 8, 8))
    rows: list[list[Tensor]] = [[], []]
    sure = []
    for t in SHOWN_T:
        abar = schedule.alphas_cumprod[t].float()
        x = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
        at = torch.tensor([t])
        rows[0].append(x)
        rows[1].append(denoised(unet, x, at, torch.tensor([label]), abar))
        sure.append(float(guide.log_probs(x, at)[0, label].exp()))
    headers = [f"t = {t}" for t in SHOWN_T]
    return picture(headers, [("noised, Eq. 1", rows[0]), ("what the U-Net sees, Eq. 6", rows[1])], [f"{p:.0%}" for p in sure])


def sampling_picture(unet: UNet, schedule: Schedule, tail: LongTail) -> bytes:
    """Ten steps from noise to an image, for three classes of the tail: the way of DDIM, without guidance."""
    rows = []
    for name in ("seven", "eight", "nine"):
        label = tail.names.index(name)
        x = batch_noise([image_key(0, label, 1)], 0, (1, 8, 8))
        tiles = [x]
        for i in reversed(range(len(schedule))):
            abar, before = schedule.alphas_cumprod[i].float(), schedule.alphas_cumprod_prev[i].float()
            x0 = denoised(unet, x, schedule.timesteps[i : i + 1], torch.tensor([label]), abar)
            noise = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
            x = before.sqrt() * x0 + (1 - before).sqrt() * noise
            tiles.append(x)
        rows.append((f"{name}, {tail.counts[label]} real images", tiles))
    return picture(["noise", *(f"step {i}" for i in range(1, len(schedule) + 1))], rows)


def denoised(unet: UNet, x: Tensor, t: Tensor, y: Tensor, abar: Tensor) -> Tensor:
    """x_0 as the network predicts it, Eq. 6, clipped to the range of images."""
    eps = unet(x, t, y if unet.classes else None)[:, : x.shape[1]]
    x0: Tensor = ((x - (1 - abar).sqrt() * eps) / abar.sqrt()).clamp(-1, 1)
    return x0


def picture(headers: list[str], rows: list[tuple[str, list[Tensor]]], below: list[str] | None = None) -> bytes:
    """Rows of 8x8 images with their names on the left, as a PNG."""
    width = LABEL_PX + len(headers) * (TILE_PX + GAP_PX)
    height = HEADER_PX + len(rows) * (TILE_PX + GAP_PX) + (HEADER_PX if below else 0)
    canvas = Image.new("L", (width, height), 255)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for i, header in enumerate(headers):
        draw.text((LABEL_PX + i * (TILE_PX + GAP_PX) + 4, 2), header, fill=0, font=font)
    for r, (name, tiles) in enumerate(rows):
        top = HEADER_PX + r * (TILE_PX + GAP_PX)
        draw.text((2, top + TILE_PX // 2 - 6), name, fill=0, font=font)
        for i, tile in enumerate(tiles):
            image = Image.fromarray(to_pixels(tile)[0, :, :, 0]).resize((TILE_PX, TILE_PX), Image.Resampling.NEAREST)
            canvas.paste(image, (LABEL_PX + i * (TILE_PX + GAP_PX), top))
    if below:
        draw.text((2, height - HEADER_PX + 2), "the guide is sure by", fill=0, font=font)
        for i, text in enumerate(below):
            draw.text((LABEL_PX + i * (TILE_PX + GAP_PX) + 14, height - HEADER_PX + 2), text, fill=0, font=font)
    data = io.BytesIO()
    canvas.save(data, "PNG", optimize=True)
    return data.getvalue()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
