"""Image sets: decoded when used and not before, once, shared by subsets."""

from collections import Counter
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from engines.data import images
from engines.data.decode import Frame
from engines.data.images import ArrayReader, EncodedReader, ImageSet, Shelf
from engines.errors import DataError


def png(value: int, size: tuple[int, int] = (4, 4)) -> bytes:
    buffer = BytesIO()
    Image.new("L", size, value).save(buffer, "PNG")
    return buffer.getvalue()


def counting(files: list[bytes]) -> tuple[EncodedReader, Counter[int]]:
    reads: Counter[int] = Counter()

    def fetch(row: int) -> bytes:
        reads[row] += 1
        return files[row]

    return EncodedReader(len(files), fetch, lambda row: f"file {row}"), reads


def image_set(files: list[bytes]) -> tuple[ImageSet, Counter[int]]:
    reader, reads = counting(files)
    return ImageSet(np.zeros(len(files), dtype=np.int64), ("a",), Shelf(reader, Frame(4, 1))), reads


@pytest.fixture
def nothing_fits(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda limit: monkeypatch.setattr(images, "MEMORY_BYTES", limit)


def test_nothing_is_read_before_the_first_use() -> None:
    whole, reads = image_set([png(v) for v in range(20)])
    part = whole.subset(np.array([3, 5]))
    assert len(part) == 2
    assert not reads


def test_each_image_is_decoded_once_however_often_it_is_used() -> None:
    whole, reads = image_set([png(v) for v in range(150)])
    part = whole.subset(np.array([140, 3, 77]))
    assert part.pixels(np.array([2, 0, 0]))[:, 0, 0, 0].tolist() == [77, 140, 140]
    assert sorted(reads) == [3, 77, 140]
    part.subset(np.array([1])).pixels(np.array([0]))
    assert whole.pixels(np.arange(150))[:, 0, 0, 0].tolist() == list(range(150))
    whole.pixels(np.arange(10))
    assert set(reads.values()) == {1}


def test_the_first_use_meets_every_broken_image() -> None:
    whole, _ = image_set([png(1), png(2), b"broken"])
    with pytest.raises(DataError, match="file 2 is not an image"):
        whole.pixels(np.array([0]))


def test_pixels_are_copies() -> None:
    whole, _ = image_set([png(5)])
    whole.pixels(np.array([0]))[:] = 0
    assert whole.pixels(np.array([0])).max() == 5


def test_what_does_not_fit_is_read_on_demand_in_any_order(nothing_fits: Callable[[int], None]) -> None:
    nothing_fits(16 * 5)
    whole, reads = image_set([png(v) for v in range(150)])
    order = np.random.default_rng(0).permutation(150)
    assert whole.pixels(order)[:, 0, 0, 0].tolist() == order.tolist()
    whole.pixels(order[:2])
    assert reads[int(order[0])] == 2
    part = whole.subset(np.array([9, 8]))  # a part that does fit is kept
    part.pixels(np.array([0, 1]))
    part.pixels(np.array([0, 1]))
    assert reads[9] == 2


def test_no_images_are_no_pixels() -> None:
    whole, _ = image_set([png(1)])
    assert whole.pixels(np.array([], dtype=np.int64)).shape == (0, 4, 4, 1)
    assert whole.subset(np.array([], dtype=np.int64)).pixels(np.array([], dtype=np.int64)).shape == (0, 4, 4, 1)


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_unreadable_images_are_left_out_and_counted(limit: int, nothing_fits: Callable[[int], None]) -> None:
    nothing_fits(limit)
    reader, _ = counting([png(0), b"", png(2), b"junk", png(4)])
    whole = ImageSet(np.arange(5), tuple("abcde"), Shelf(reader, Frame(4, 1)))
    kept = whole.without_unreadable()
    assert kept.labels.tolist() == [0, 2, 4]
    assert kept.skipped == 2
    assert kept.pixels(np.arange(3))[:, 0, 0, 0].tolist() == [0, 2, 4]
    assert kept.origin(1) == "file 2"


def test_original_sizes_are_counted_without_decoding() -> None:
    buffer = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)).save(buffer, "BMP")
    cut = buffer.getvalue()[:-100]
    whole, _ = image_set([png(0), cut, png(0)])
    assert whole.sizes == {(4, 4): 2, (30, 20): 1}


def test_arrays_are_resized_and_change_channels() -> None:
    pixels = np.zeros((2, 8, 8, 1), dtype=np.uint8)
    pixels[1] = 200
    shelf = Shelf(ArrayReader(pixels, "array"), Frame(16, 3))
    whole = ImageSet(np.arange(2), ("a", "b"), shelf)
    assert whole.pixels(np.array([1])).shape == (1, 16, 16, 3)
    assert (whole.pixels(np.array([1])) == 200).all()
    assert whole.sizes == {(8, 8): 2}


def test_decoding_ahead_reports_how_far_it_is() -> None:
    whole, reads = image_set([png(v % 256) for v in range(1500)])
    told: list[tuple[str, int, int]] = []
    whole.preload(lambda what, done, total, figures: told.append((what, done, total)))
    assert told == [("decode", 1024, 1500), ("decode", 1500, 1500)]
    whole.pixels(np.arange(1500))
    assert set(reads.values()) == {1}
