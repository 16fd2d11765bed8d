"""Batches: which images a training step sees, their tensors, and threads that draw them ahead.

Every draw is a pure function of (seed, purpose, step), so that a resumed run needs no state and no step depends on how
many were drawn before it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engines.data.images import Indices

Probabilities = npt.NDArray[np.float64]
ClassSampling = Literal["natural", "balanced", "sqrt"]
T = TypeVar("T")

ALL = slice(None)  # rows of a batch
DRAWN_AHEAD = 2  # batches a worker thread has ready or in the making


@dataclass(frozen=True)
class Batch:
    """Some rows of a step's global batch: all that is random about them, drawn on the CPU."""

    pixels: Tensor  # (B, C, H, W) uint8, augmented
    y: Tensor  # (B,) int64
    u: Tensor  # (B,) in [0, 1), of which the device makes the timestep
    noise: Tensor  # (B, C, H, W) float32, standard normal
    unlabeled: Tensor  # (B,) bool, whose label is hidden from a conditional network
    parts: int = 1  # the global batch has so many times these rows

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def x0(self) -> Tensor:
        """(B, C, H, W) float32 in [-1, 1]: pixels travel as bytes and are scaled where they arrive."""
        return scaled(self.pixels)

    def part(self, i: int, n: int) -> Batch:
        """The i-th of n runs of rows, all of one length."""
        size, rest = divmod(len(self), n)
        assert not rest, f"{len(self)} rows in {n} parts"
        rows = slice(i * size, (i + 1) * size)
        return replace(self._each(lambda tensor: tensor[rows]), parts=self.parts * n)

    def pinned(self) -> Batch:
        """In page-locked memory, from which a GPU copies while it computes."""
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """On a device; the copy of a pinned batch is not waited for."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(change(self.pixels), change(self.y), change(self.u), change(self.noise), change(self.unlabeled), self.parts)


@contextlib.contextmanager
def drawn_ahead(draw: Callable[[int], T], first: int, end: int, workers: int) -> Iterator[Iterator[T]]:
    """draw(first) .. draw(end - 1) in order, the coming ones drawn by `workers` threads; 0 = each when it is asked for.

    `draw` must be a pure function of the step: then the number of workers changes nothing. An exception of `draw` is raised when
    its step is asked for. At the end of the block no thread is left.
    """
    if not workers:
        yield map(draw, range(first, end))
        return

    def in_order() -> Iterator[T]:
        waiting: deque[Future[T]] = deque()
        for step in range(first, end):
            for coming in range(step + len(waiting), min(step + DRAWN_AHEAD * workers, end)):
                waiting.append(threads.submit(draw, coming))
            yield waiting.popleft().result()

    with ThreadPoolExecutor(workers, thread_name_prefix="draw") as threads:
        try:
            yield in_order()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)  # what is running ends by itself, the rest is not begun


def natural_batch(count: int, batch_size: int, seed: int, step: int, purpose: str = "natural") -> Indices:
    """(B,) indices below `count`: every image once an epoch, in a new order each; a batch may span epochs.

    Args:
        count: N images.
        purpose: draws of different purposes are independent.
    """
    assert count > 0
    assert step >= 0
    position = step * batch_size + np.arange(batch_size)
    epoch, place = np.divmod(position, count)
    return np.concatenate([_permutation(count, seed, purpose, e)[place[epoch == e]] for e in range(int(epoch[0]), int(epoch[-1]) + 1)])


def class_batch(
    indices_by_class: Sequence[Indices], probabilities: Probabilities, batch_size: int, seed: int, step: int, purpose: str = "class"
) -> Indices:
    """(B,) indices: per image a class is drawn with `probabilities` (K,), then one of its images uniformly."""
    rng = generator(seed, purpose, step)
    classes = rng.choice(len(indices_by_class), size=batch_size, p=probabilities)
    return np.array([indices_by_class[k][rng.integers(len(indices_by_class[k]))] for k in classes], dtype=np.int64)


def group_batch(
    indices_by_class: Sequence[Indices],
    probabilities: Probabilities,
    groups: int,
    group_size: int,
    seed: int,
    step: int,
    purpose: str = "group",
) -> Indices:
    """(groups * M,) indices: `groups` runs of M images of one class each, the class drawn with `probabilities` (K,).

    Within a run no image comes twice, unless the class has fewer than M: then each comes equally often, give or take one.
    """
    rng = generator(seed, purpose, step)
    classes = rng.choice(len(indices_by_class), size=groups, p=probabilities)
    return np.concatenate([_without_repeats(indices_by_class[k], group_size, rng) for k in classes])


def by_class(labels: Indices, classes: int) -> list[Indices]:
    """For each of K classes the indices of its images, ascending."""
    return [np.flatnonzero(labels == k) for k in range(classes)]


def class_probabilities(counts: Indices, how: ClassSampling) -> Probabilities:
    """(K,) with which a class is drawn: as N_k ("natural"), all alike ("balanced"), or as sqrt(N_k); 0 where N_k = 0."""
    power = {"natural": 1.0, "sqrt": 0.5, "balanced": 0.0}[how]
    weights = np.where(counts > 0, np.power(counts.astype(np.float64), power), 0.0)
    assert weights.sum() > 0
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """A Philox generator keyed by (seed, purpose, counters): any other combination gives an independent stream."""
    return np.random.Generator(np.random.Philox(key=np.frombuffer(_key(seed, purpose, counters), dtype="<u8")))


def torch_generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """The same for torch, on the CPU."""
    return torch.Generator().manual_seed(int.from_bytes(_key(seed, purpose, counters)[:8], "little") >> 1)


def to_tensor(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """(B, H, W, C) uint8 -> (B, C, H, W) float32 in [-1, 1]: x = pixels / 127.5 - 1."""
    return scaled(channels_first(pixels))


def channels_first(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """(B, H, W, C) uint8 -> (B, C, H, W) uint8."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def scaled(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], on any device: x = pixels / 127.5 - 1."""
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


def to_pixels(x: Tensor) -> npt.NDArray[np.uint8]:
    """(B, C, H, W) in [-1, 1], clipped -> (B, H, W, C) uint8, rounded: undoes `to_tensor` exactly."""
    levels = x.detach().to("cpu", torch.float32).add(1.0).mul(127.5).round().clamp(0, 255)
    return np.ascontiguousarray(levels.to(torch.uint8).numpy().transpose(0, 2, 3, 1))


def _without_repeats(members: Indices, count: int, rng: np.random.Generator) -> Indices:
    rounds = -(-count // len(members))
    return np.concatenate([rng.permutation(members) for _ in range(rounds)])[:count]


@lru_cache(maxsize=8)
def _permutation(count: int, seed: int, purpose: str, epoch: int) -> Indices:
    order = generator(seed, purpose, epoch).permutation(count)
    order.flags.writeable = False
    return order


def _key(seed: int, purpose: str, counters: tuple[int, ...]) -> bytes:
    return hashlib.blake2b(repr((seed, purpose, counters)).encode(), digest_size=16).digest()
