"""Pairs of 64-bit hashes that differ in few bits: exact, and far below all pairs.

Multi-index hashing (Norouzi, Punjani & Fleet 2012): the 64 bits are four words of 16. Of two hashes that differ in at most 7
bits one word differs in at most 1 bit, so that it is enough to look, for each word, at the hashes that have that word or one
of its 16 neighbors: 17 of 65,536 buckets, four times. A pair is then counted out over all 64 bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from engines.data.images import Indices

Hashes = npt.NDArray[np.uint64]

WORDS, WORD_BITS = 4, 16
MAX_DISTANCE = 2 * WORDS - 1  # beyond it, every word of a pair may differ in two bits
BLOCK_PAIRS = 1 << 20  # compared at a time: bounds the memory


def close_pairs(hashes: Hashes, distance: int) -> Iterator[Indices]:
    """All pairs i < j of hashes that differ in at most `distance` bits, each once, in blocks of (P, 2).

    Args:
        hashes: (N,) uint64.
        distance: 0..MAX_DISTANCE.
    """
    assert 0 <= distance <= MAX_DISTANCE
    flips = [0] if distance < WORDS else [0, *(1 << bit for bit in range(WORD_BITS))]
    for word in range(WORDS):
        keys = _word(hashes, word)
        order = np.argsort(keys, kind="stable").astype(np.int64)
        starts = np.searchsorted(keys[order], np.arange((1 << WORD_BITS) + 1))
        for flip in flips:
            for pairs in _joined(keys, order, starts, flip):
                yield from _kept(hashes, pairs, distance, word)


def _word(hashes: Hashes, word: int) -> npt.NDArray[np.int64]:
    return ((hashes >> np.uint64(word * WORD_BITS)) & np.uint64(0xFFFF)).astype(np.int64)


def _joined(keys: Indices, order: Indices, starts: Indices, flip: int) -> Iterator[Indices]:
    """(P, 2) pairs of which one's word is the other's with `flip`: each unordered pair once."""
    places = np.arange(len(order), dtype=np.int64)
    own = keys[order]
    if flip:  # from the smaller word's side alone
        places = places[own < own ^ flip]
        first, last = starts[own[places] ^ flip], starts[(own[places] ^ flip) + 1]
    else:
        first, last = places + 1, starts[own + 1]
    counts = last - first
    ends = np.cumsum(counts)
    done = 0
    while done < len(places):
        before = int(ends[done - 1]) if done else 0
        upto = max(done + 1, int(np.searchsorted(ends, before + BLOCK_PAIRS, side="right")))
        n = counts[done:upto]
        total = int(n.sum())
        if total:
            offsets = np.arange(total, dtype=np.int64) - np.repeat(np.cumsum(n) - n, n)
            yield np.stack([order[np.repeat(places[done:upto], n)], order[np.repeat(first[done:upto], n) + offsets]], axis=1)
        done = upto


def _kept(hashes: Hashes, pairs: Indices, distance: int, word: int) -> Iterator[Indices]:
    """Those within the distance that no earlier word has found."""
    differing = hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]
    close = np.bitwise_count(differing) <= distance
    pairs, differing = pairs[close], differing[close]
    radius = 0 if distance < WORDS else 1
    for earlier in range(word):
        new = np.bitwise_count(_word(differing, earlier)) > radius
        pairs, differing = pairs[new], differing[new]
    if len(pairs):
        yield np.sort(pairs, axis=1)
