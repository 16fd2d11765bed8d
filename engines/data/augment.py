"""Augmentation of image tensors (B, C, H, W): flip, shift, crop; each image drawn on its own from a CPU generator."""

from __future__ import annotations

import torch
from torch import Tensor

BLACK = -1.0


def flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored left to right with probability 1/2."""
    mirrored = torch.rand(len(x), generator=generator).lt(0.5).to(x.device)  # (B,)
    return torch.where(mirrored[:, None, None, None], x.flip(3), x)


def shift(x: Tensor, max_px: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `max_px` pixels each way, uniformly; its border pixels are repeated."""
    rows, columns = _window(x, max_px, generator)
    height, width = x.shape[2:]
    return _gather(x, rows.clamp(0, height - 1), columns.clamp(0, width - 1))


def crop(x: Tensor, padding_px: int, generator: torch.Generator) -> Tensor:
    """Each image padded with black by `padding_px` on all sides and cut back to its size at random: CIFAR's "crop 4"."""
    rows, columns = _window(x, padding_px, generator)
    height, width = x.shape[2:]
    moved = _gather(x, rows.clamp(0, height - 1), columns.clamp(0, width - 1))
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]  # (B, H, W)
    return moved.masked_fill(~inside[:, None], BLACK)


def _window(x: Tensor, reach: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Source rows (B, H) and columns (B, W) of every image, moved by a whole number in -reach..reach."""
    offsets = torch.randint(-reach, reach + 1, (2, len(x), 1), generator=generator).to(x.device)
    rows = torch.arange(x.shape[2], device=x.device) + offsets[0]  # (B, H)
    columns = torch.arange(x.shape[3], device=x.device) + offsets[1]  # (B, W)
    return rows, columns


def _gather(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    down = x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
    return down.gather(3, columns[:, None, None, :].expand(-1, x.shape[1], x.shape[2], -1))
