"""Noise that depends on nothing but its name: Philox normals, a pure function of (seed, class id, index, step).

Batch size, shards, workers, engine and device therefore never change an image's noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def image_key(seed: int, class_id: int, index: int) -> int:
    """The 128-bit Philox key of one image."""
    name = f"{seed}/{class_id}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")


def image_noise(key: int, step: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 noise of one image at one step; each step has 2^64 counter values of its own."""
    generator = np.random.Generator(np.random.Philox(key=key, counter=step << 64))
    return generator.standard_normal(shape, dtype=np.float32)


def batch_noise(keys: Sequence[int], step: int, shape: tuple[int, int, int]) -> Tensor:
    """(B, C, H, W) float32 standard normal on the CPU: one image's noise per key."""
    out = np.empty((len(keys), *shape), dtype=np.float32)
    for row, key in enumerate(keys):
        out[row] = image_noise(key, step, shape)
    return torch.from_numpy(out)
