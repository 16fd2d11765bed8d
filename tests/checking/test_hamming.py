"""The search for close hashes finds what comparing all pairs finds."""

import numpy as np
import pytest

from engines.checking import hamming
from engines.checking.hamming import close_pairs


def planted(count: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Random hashes, and for each of them one that differs in 0 to 10 bits anywhere."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    near = hashes.copy()
    for i in range(count):
        for bit in rng.permutation(64)[: i % 11]:
            near[i] ^= np.uint64(1) << np.uint64(bit)
    return rng.permutation(np.concatenate([hashes, near]))


@pytest.mark.parametrize("distance", [0, 3, 4, 7])
def test_every_pair_within_the_distance_is_found_once(distance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hamming, "BLOCK_PAIRS", 50)  # several blocks
    hashes = planted(150, distance)
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None])
    expected = {(i, j) for i, j in np.argwhere(apart <= distance).tolist() if i < j}
    found = [tuple(pair) for block in close_pairs(hashes, distance) for pair in block.tolist()]
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert len(expected) >= 12 * (distance + 1)


def test_bits_that_all_lie_in_one_word_or_two_in_each_of_three_are_found() -> None:
    for flipped in (0x7F, 0x0000_0003_0003_0007, 0x0003_0003_0003_0001):
        hashes = np.array([0x0123_4567_89AB_CDEF, 0x0123_4567_89AB_CDEF ^ flipped], dtype=np.uint64)
        assert [block.tolist() for block in close_pairs(hashes, 7)] == [[[0, 1]]]


def test_few_of_all_pairs_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0
    kept = hamming._kept

    def counting(hashes, pairs, distance, word):  # type: ignore[no-untyped-def]
        nonlocal compared
        compared += len(pairs)
        return kept(hashes, pairs, distance, word)

    monkeypatch.setattr(hamming, "_kept", counting)
    hashes = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    list(close_pairs(hashes, 7))
    assert compared < 20_000**2 / 2 / 500
