"""Augmentation of image tensors (B, C, H, W): flip, shift, crop; each image drawn on its own from a CPU generator.

What is drawn and what is done with it are apart (`drawn_flips` and `mirror`, `drawn_offsets` and `move`), so that some rows of
a batch can be augmented as in the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLACK = -1.0


def flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored left to right with probability 1/2."""
    return mirror(x, drawn_flips(len(x), generator))


def shift(x: Tensor, max_px: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `max_px` pixels each way, uniformly; its border pixels are repeated."""
    return move(x, drawn_offsets(len(x), max_px, generator))


def crop(x: Tensor, padding_px: int, generator: torch.Generator) -> Tensor:
    """Each image padded with black by `padding_px` on all sides and cut back to its size at random: CIFAR's "crop 4"."""
    rows, columns = _window(x, drawn_offsets(len(x), padding_px, generator))
    height, width = x.shape[2:]
    moved = _gather(x, rows.clamp(0, height - 1), columns.clamp(0, width - 1))
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]  # (B, H, W)
    return moved.masked_fill(~inside[:, None], BLACK)


def drawn_flips(count: int, generator: torch.Generator) -> Tensor:
    """(B,) bool: which images `flip` mirrors."""
    return torch.rand(count, generator=generator).lt(0.5)


def mirror(x: Tensor, chosen: Tensor) -> Tensor:
    """The chosen images (B,) mirrored left to right."""
    return torch.where(chosen.to(x.device)[:, None, None, None], x.flip(3), x)


def drawn_offsets(count: int, reach: int, generator: torch.Generator) -> Tensor:
    """(2, B, 1) int64 in -reach..reach: rows and columns by which `shift` and `crop` move."""
    return torch.randint(-reach, reach + 1, (2, count, 1), generator=generator)


def move(x: Tensor, offsets: Tensor) -> Tensor:
    """Each image moved by offsets (2, B, 1) px; its border pixels are repeated."""
    rows, columns = _window(x, offsets)
    height, width = x.shape[2:]
    return _gather(x, rows.clamp(0, height - 1), columns.clamp(0, width - 1))


def _window(x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Source rows (B, H) and columns (B, W) of every image."""
    offsets = offsets.to(x.device)
    rows = torch.arange(x.shape[2], device=x.device) + offsets[0]  # (B, H)
    columns = torch.arange(x.shape[3], device=x.device) + offsets[1]  # (B, W)
    return rows, columns


def _gather(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    down = x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
    return down.gather(3, columns[:, None, None, :].expand(-1, x.shape[1], x.shape[2], -1))
