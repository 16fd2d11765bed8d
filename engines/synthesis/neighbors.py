"""The two nearest of many points, exactly: what `copies` asks of every image.

Products in blocks propose a few neighbors, differences in float64 decide, and a bound of the rounding error says where they cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

CANDIDATES = 8  # real images an approximate search proposes for exact comparison
QUERY_ROWS, REAL_ROWS = 512, 2048  # bound the memory

Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""`map`, or that of a pool."""


class Neighbors(NamedTuple):
    """Of each of Q images its nearest real image, and how far that one and the second nearest are."""

    nearest: Tensor  # (Q,) int64
    first: Tensor  # (Q,) float64, d1
    second: Tensor  # (Q,) float64, d2; inf where there is only one real image
    mirrored: Tensor  # (Q,) bool: it is the image's mirror image that is so near


def nearest_two(views: Sequence[Tensor], real: Tensor, leave_out: Tensor | None = None, each: Each = map) -> Neighbors:
    """The two nearest of R real images, exactly: products in blocks propose a few, differences in float64 decide.

    Products cancel where images are near, which is where it matters. A row whose proposals a bound of the rounding error does not
    prove to hold the two nearest is compared with all.

    Args:
        views: one or two of (Q, D): the images and, where that counts as near too, their mirror images. uint8, or float64.
        real: (R, D), of the same dtype, R >= 1. Of equally near ones the first counts.
        leave_out: (Q,) int64, for each image the real one that is itself.
        each: how blocks of images are mapped over; the result does not depend on it.
    """
    assert len(views[0]) and len(real)
    own = torch.full((len(views[0]),), -1) if leave_out is None else leave_out

    def block(start: int) -> Neighbors:
        rows = slice(start, start + QUERY_ROWS)
        return _nearest_two([view[rows] for view in views], real, own[rows])

    blocks = list(each(block, range(0, len(own), QUERY_ROWS)))
    return Neighbors(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))


def copy_ratios(neighbors: Neighbors, resolution: float = 0.0) -> Tensor:
    """d1 / d2, (Q,) float64 in [0, 1]; 1, which is no copy, where there is no second or it is as near as the distances can tell."""
    tells = neighbors.second.isfinite() & (neighbors.second > resolution)
    return torch.where(tells, neighbors.first / torch.where(tells, neighbors.second, 1.0), 1.0)


def _nearest_two(views: Sequence[Tensor], real: Tensor, own: Tensor) -> Neighbors:
    count = min(CANDIDATES, len(real))
    values = [_values(view) for view in views]
    norms = [value.square().sum(1, keepdim=True) for value in values]  # (B, 1)
    best, at = values[0].new_empty(len(own), 0), own.new_empty(len(own), 0)
    largest = 0.0
    for start in range(0, len(real), REAL_ROWS):
        block = _values(real[start : start + REAL_ROWS])  # (R', D)
        sizes = block.square().sum(1)  # (R',)
        largest = max(largest, float(sizes.max()))
        squares = norms[0] + sizes - 2 * (values[0] @ block.T)  # (B, R')
        for norm, mirrored in zip(norms[1:], values[1:], strict=True):
            squares = torch.minimum(squares, norm + sizes - 2 * (mirrored @ block.T))
        self_rows = ((own >= start) & (own < start + len(block))).nonzero().flatten()
        squares[self_rows, own[self_rows] - start] = torch.inf
        squares = torch.cat([best, squares], 1)
        best, places = squares.topk(min(count, squares.shape[1]), largest=False)
        at = torch.cat([at, torch.arange(start, start + len(block)).expand(len(own), -1)], 1).gather(1, places)
    found = _exact(views, real, at, own)
    if count < len(real):  # every other image's square is at least the last proposal's, but for what rounding may have added
        rounding = (views[0].shape[1] + 8) * torch.finfo(best.dtype).eps * (torch.cat(norms, 1).amax(1) + largest)
        unproven = (found.second.square() > (best[:, -1] - rounding).double()).nonzero().flatten()
        for row in unproven:
            every = torch.arange(len(real))[None]
            exact = _exact([view[row][None] for view in views], real, every, own[row][None])
            for column, value in zip(found, exact, strict=True):
                column[row] = value[0]
    return found


def _exact(views: Sequence[Tensor], real: Tensor, at: Tensor, own: Tensor) -> Neighbors:
    """The two nearest among the real images `at` (B, C)."""
    at = at.sort(1).values
    squares = torch.empty(at.shape, dtype=torch.float64)
    mirrored = torch.zeros(at.shape, dtype=torch.bool)
    for column in range(0, at.shape[1], step := max(1, QUERY_ROWS // len(at))):
        part = real[at[:, column : column + step]].double()  # (B, C', D)
        square, view = torch.stack([(part - view[:, None].double()).square().sum(2) for view in views]).min(0)
        squares[:, column : column + step], mirrored[:, column : column + step] = square, view > 0
    squares[at == own[:, None]] = torch.inf
    distances, order = squares.sqrt().sort(dim=1, stable=True)
    second = distances[:, 1] if at.shape[1] > 1 else torch.full_like(distances[:, 0], torch.inf)
    first = order[:, :1]
    return Neighbors(at.gather(1, first)[:, 0], distances[:, 0].clone(), second.clone(), mirrored.gather(1, first)[:, 0])


def _values(x: Tensor) -> Tensor:
    """Pixels around 0, exact in float32 and small, for the sake of the rounding; features as they are."""
    return x.float() - 127.5 if x.dtype == torch.uint8 else x
