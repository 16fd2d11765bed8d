"""Images that are there twice: the same bytes, or nearly the same pixels.

Near ones are found by their hashes of looks and confirmed on pixels: the root mean square of the differences at 32 px, as a
share of the contrast of the flatter of the two images. How near is too near depends on the data: two handwritten digits of
8 px differ by less than two crops of one photograph. So a share is held to what the nearest image of an image usually is in
this very set. And light above, dark below is the contrast of many a photograph: what is left of two images without the mean of
each 8 x 8 px must be correlated too. On CIFAR-10, of pairs as near as the limit, all with a correlation under 0.74 were two scenes
and all over 0.79 were one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engines.checking.fingerprints import LOOK
from engines.checking.hamming import MAX_DISTANCE, close_pairs
from engines.data.decode import Frame, Pixels
from engines.data.images import ImageSet, Indices
from engines.progress import Report, silent

SHARE_OF_USUAL = 0.4  # of the usual distance between nearest images
SURELY, AT_MOST = 0.1, 0.45  # distances that are near, and far, in any set
DETAIL_PX, LEAST_CORRELATION = 8, 0.76  # of details, unless a pair is surely near
LEAST_CONTRAST = 4.0  # gray levels: below it an image is flat, and noise would decide
SAMPLE, ASKED = 1024, 256  # images among which the nearest are looked for, and for how many of them
MAX_CANDIDATES = 1 << 19  # pairs that are compared by pixels, those with the nearest hashes first
BLOCK_IMAGES, BLOCK_PAIRS = 8192, 512  # decoded, and compared, at a time
SEED = 0  # of the sample

Reals = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Pairs:
    """Pairs of images, the nearest first.

    Attributes:
        members: (P, 2) indices, the smaller first.
        distances: (P,) 0 for the same bytes, else as the module's docstring says.
        exact: (P,) whether the bytes are the same.
        limit: the largest distance that counted as near.
        usual: what the nearest image usually is away in this set; 0 where it was not needed.
        compared: candidates compared by pixels.
        left_out: candidates that were not, since there were more than MAX_CANDIDATES.
    """

    members: Indices
    distances: Reals
    exact: npt.NDArray[np.bool_]
    limit: float
    usual: float
    compared: int
    left_out: int

    def __len__(self) -> int:
        return len(self.members)


class Album:
    """Images of several sets under one numbering, decoded when asked for."""

    def __init__(self, sets: Sequence[ImageSet]) -> None:
        self._sets = sets
        self._starts = np.cumsum([0, *(len(images) for images in sets)])

    def pixels(self, indices: Indices, frame: Frame = LOOK) -> Pixels:
        """(B, S, S, C) uint8. Raises DataError where an image has gone bad meanwhile."""
        out = np.empty((len(indices), frame.size_px, frame.size_px, frame.channels), dtype=np.uint8)
        for images, start, end in zip(self._sets, self._starts[:-1], self._starts[1:], strict=True):
            here = np.flatnonzero((indices >= start) & (indices < end))
            if len(here):
                out[here] = images.reader.read(images.rows[indices[here] - start], frame)
        return out

    def origin(self, index: int) -> str:
        """Where an image lies."""
        k = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._sets[k].origin(index - int(self._starts[k]))


def likenesses(
    album: Album,
    good: Indices,
    digests: npt.NDArray[np.void],
    looks: npt.NDArray[np.uint64],
    near: bool = True,
    report: Report = silent,
) -> Pairs:
    """All pairs of the same bytes (each with the first of them), and the near pairs among what is then left.

    Args:
        good: indices of the images that can be read.
        digests: (N,) of all images' bytes.
        looks: (N,) hashes of all images' looks.
        near: look for near pairs too.
    """
    _, first, which = np.unique(digests[good], return_index=True, return_inverse=True)
    original = good[first[which]]
    again = original != good
    same = np.stack([original[again], good[again]], axis=1)
    single = good[~again]
    candidates, left_out = _nearest(close_pairs(looks[single], MAX_DISTANCE) if near else (), looks[single])
    candidates = single[candidates]
    distances = _distances(album, candidates, report)
    usual = 0.0
    limit = AT_MOST
    if ((distances > SURELY) & (distances <= AT_MOST)).any():
        usual = _usual_distance(album, single)
        limit = float(np.clip(SHARE_OF_USUAL * usual, SURELY, AT_MOST))
    close = distances <= limit
    members = np.concatenate([same, candidates[close]])
    away = np.concatenate([np.zeros(len(same), np.float32), distances[close]])
    exact = np.arange(len(members)) < len(same)
    order = np.lexsort((members[:, 1], members[:, 0], away, ~exact))
    return Pairs(members[order], away[order], exact[order], limit, usual, len(candidates), left_out)


def _nearest(blocks: Iterable[Indices], looks: npt.NDArray[np.uint64]) -> tuple[Indices, int]:
    """At most MAX_CANDIDATES of the pairs, those with the nearest hashes, in order of their members; and how many more there were."""
    kept = np.empty((0, 2), dtype=np.int64)
    total = 0
    for block in blocks:
        total += len(block)
        kept = np.concatenate([kept, block])
        if len(kept) > MAX_CANDIDATES:
            bits = np.bitwise_count(looks[kept[:, 0]] ^ looks[kept[:, 1]])
            kept = kept[np.argsort(bits, kind="stable")[:MAX_CANDIDATES]]
    return kept[np.lexsort((kept[:, 1], kept[:, 0]))], total - len(kept)


def _distances(album: Album, pairs: Indices, report: Report) -> Reals:
    """(P,) distances of (P, 2) pairs, infinite where details disagree; of the images at most BLOCK_IMAGES are held at a time."""
    found = np.empty(len(pairs), dtype=np.float32)
    for start, end in _spans(pairs):
        members, places = np.unique(pairs[start:end], return_inverse=True)
        pixels = album.pixels(members)
        places = places.reshape(-1, 2)
        for at in range(0, end - start, BLOCK_PAIRS):
            block = places[at : at + BLOCK_PAIRS]
            a, b = (pixels[block[:, side]].astype(np.float32) for side in (0, 1))  # (B, 32, 32, 3)
            apart = np.sqrt(np.square(a - b).mean(axis=(1, 2, 3))) / np.minimum(_contrast(a), _contrast(b))
            two_scenes = (apart > SURELY) & (_correlation(_details(a), _details(b)) < LEAST_CORRELATION)
            found[start + at : start + at + len(block)] = np.where(two_scenes, np.inf, apart)
        report("compare", end, len(pairs), {})
    return found


def _spans(pairs: Indices) -> Iterator[tuple[int, int]]:
    """Parts of the pairs that name at most BLOCK_IMAGES images, counted generously."""
    for start in range(0, len(pairs), BLOCK_IMAGES // 2):
        yield start, min(start + BLOCK_IMAGES // 2, len(pairs))


def _contrast(pixels: Reals) -> Reals:
    """(B,) standard deviation over an image, averaged over its channels, in gray levels."""
    spread: Reals = pixels.reshape(len(pixels), -1, pixels.shape[3]).std(axis=1).mean(axis=1)
    return np.maximum(spread, np.float32(LEAST_CONTRAST))


def _details(pixels: Reals) -> Reals:
    """(B, 32, 32, 3) without the mean of each square of DETAIL_PX."""
    count, side = len(pixels), LOOK.size_px // DETAIL_PX
    squares = pixels.reshape(count, side, DETAIL_PX, side, DETAIL_PX, LOOK.channels)
    details: Reals = (squares - squares.mean(axis=(2, 4), keepdims=True)).reshape(count, -1)
    return details


def _correlation(a: Reals, b: Reals) -> Reals:
    """(B,) of (B, D) details, whose mean is 0; 0 where there are none."""
    products: Reals = (a * b).sum(axis=1) / np.sqrt(np.maximum(np.square(a).sum(axis=1) * np.square(b).sum(axis=1), 1.0))
    return products


def _usual_distance(album: Album, good: Indices) -> float:
    """The median distance from an image to the nearest of a thousand others, both drawn at random."""
    rng = np.random.Generator(np.random.PCG64(SEED))
    drawn = np.sort(rng.permutation(good)[:SAMPLE])
    pixels = album.pixels(drawn).astype(np.float32)
    flat = pixels.reshape(len(pixels), -1)
    asked = rng.permutation(len(flat))[:ASKED]
    squares = np.square(flat).sum(axis=1)
    apart = np.maximum(squares[asked, None] + squares[None] - 2 * flat[asked] @ flat.T, 0) / flat.shape[1]
    apart[np.arange(len(asked)), asked] = np.inf
    contrast = _contrast(pixels)
    return float(np.median((np.sqrt(apart) / np.minimum(contrast[asked, None], contrast[None])).min(axis=1)))
