"""Noise that depends on nothing but its name: Philox normals, a pure function of (seed, class id, index, step).

Batch size, shards, workers, engine and device therefore never change an image's noise.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

IMAGES_AT_ONCE = 32  # a thread's share of a batch, about a millisecond at 32 px

Each = Callable[[Callable[[int], None], Iterable[int]], Iterable[None]]


def image_key(seed: int, class_id: int, index: int) -> int:
    """The 128-bit Philox key of one image."""
    name = f"{seed}/{class_id}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")


def image_noise(key: int, step: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 noise of one image at one step; each step has 2^64 counter values of its own."""
    return _own.at(key, step).standard_normal(shape, dtype=np.float32)


def batch_noise(keys: Sequence[int], step: int, shape: tuple[int, int, int], each: Each = map) -> Tensor:
    """(B, C, H, W) float32 standard normal on the CPU: one image's noise per key.

    Args:
        each: `map`, or that of a pool of threads: a GPU may want a step's noise sooner than one of them has drawn it.
    """
    out = np.empty((len(keys), *shape), dtype=np.float32)

    def draw(first: int) -> None:
        for row, key in enumerate(keys[first : first + IMAGES_AT_ONCE], start=first):
            _own.at(key, step).standard_normal(dtype=np.float32, out=out[row])

    for _ in each(draw, range(0, len(keys), IMAGES_AT_ONCE)):
        pass
    return torch.from_numpy(out)


class _Own(threading.local):
    """A thread's generator, told for each image where to begin: making a new one asks the system for entropy and costs ten times that."""

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._philox)

    def at(self, key: int, step: int) -> np.random.Generator:
        """What np.random.Generator(np.random.Philox(key=key, counter=step << 64)) would draw."""
        self._philox.state = {
            "bit_generator": "Philox",
            "state": {"counter": np.array([0, step, 0, 0], dtype=np.uint64), "key": np.array([key & _WORD, key >> 64], dtype=np.uint64)},
            "buffer": _EMPTY,
            "buffer_pos": len(_EMPTY),  # its end: nothing is left of an earlier draw
            "has_uint32": 0,
            "uinteger": 0,
        }
        return self._generator


_WORD = (1 << 64) - 1
_EMPTY = np.zeros(4, dtype=np.uint64)
_own = _Own()
