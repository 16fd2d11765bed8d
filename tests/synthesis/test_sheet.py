"""Synthesized PNGs say what they are, are read back exactly, and nothing damaged passes."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engines import store
from engines.errors import DataError
from engines.synthesis.select import REASONS, Figures, Reason
from engines.synthesis.sheet import (
    RED,
    PairsRow,
    PairTile,
    Record,
    SheetRow,
    contact_sheet,
    decode_png,
    encode_png,
    grid_png,
    image_path,
    pairs_sheet,
    pixels_sha256,
    read_images,
    scan_class,
)

PLAN = "0123456789abcdef"


def image(channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, channels), dtype=np.uint8)


def record_of(pixels: np.ndarray, class_id: int = 2, name: str = "black_swan", index: int = 7, kept: bool = True) -> Record:
    figures = Figures() if kept else Figures(1.25, 0.5, 1 / 3)
    return Record(PLAN, class_id, name, index, 5, pixels_sha256(pixels), '{"torch": "2"}', figures, "" if kept else "both")


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_comes_back_as_it_was_with_its_record(channels: int) -> None:
    pixels = image(channels)
    for record in (record_of(pixels), record_of(pixels, kept=False)):
        found, read = decode_png(encode_png(pixels, record), record.class_name, "x.png")
        assert np.array_equal(found, pixels)
        assert read == record


def test_the_text_of_a_png_says_that_it_is_synthetic_and_how_to_remake_it() -> None:
    pixels = image()
    with Image.open(io.BytesIO(encode_png(pixels, record_of(pixels)))) as opened:
        opened.load()
        text = opened.text
    assert text["synthetic"] == "true"
    assert (text["plan"], text["class"], text["class_id"], text["index"], text["seed"]) == (PLAN, "black_swan", "2", "7", "5")
    assert text["pixels_sha256"] == pixels_sha256(pixels)
    assert text["versions"] == '{"torch": "2"}'


@pytest.mark.parametrize("name", ["\0", "ü𝟘\u202e", "a\nb", "x" * 10_000, "[red]"])
def test_any_class_name_fits_into_the_text(name: str) -> None:
    pixels = image()
    found, read = decode_png(encode_png(pixels, record_of(pixels, name=name)), name, "x.png")
    assert np.array_equal(found, pixels)
    assert read.class_name == name


def test_the_hash_knows_the_shape_as_well_as_the_values() -> None:
    pixels = image(1)
    assert pixels_sha256(pixels) != pixels_sha256(pixels.reshape(4, 16, 1))


def test_every_truncation_and_every_flipped_bit_is_noticed() -> None:
    data = encode_png(image(1), record_of(image(1)))
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        for damaged in (data[:at], bytes(flipped)):
            with pytest.raises(DataError):
                decode_png(damaged, "black_swan", "x.png")


def test_pixels_that_do_not_match_their_hash_are_refused() -> None:
    data = encode_png(image(seed=1), record_of(image(seed=0)))
    with pytest.raises(DataError, match="do not match"):
        decode_png(data, "black_swan", "x.png")


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"<html>"])
def test_what_is_no_png_of_ours_is_refused(data: bytes) -> None:
    with pytest.raises(DataError):
        decode_png(data, "black_swan", "x.png")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="PNG")
    with pytest.raises(DataError):
        decode_png(buffer.getvalue(), "black_swan", "x.png")


def test_a_scan_trusts_only_images_of_the_plan_at_their_place(tmp_path: Path) -> None:
    names = ["a", "b", "black_swan"]

    def put(pixels: np.ndarray, record: Record, at: Path | None = None) -> None:
        store.write_bytes(tmp_path / (at or record.path()), encode_png(pixels, record))

    put(image(seed=1), record_of(image(seed=1), index=0))
    put(image(seed=2), record_of(image(seed=2), index=1, kept=False))
    put(image(seed=3), replace(record_of(image(seed=3), index=2), plan="another"))
    put(image(seed=4), record_of(image(seed=4), index=3), at=image_path("black_swan", 2, 4))  # renamed
    put(image(seed=5), record_of(image(seed=5), class_id=1, index=5), at=image_path("black_swan", 2, 5))  # of another class
    store.write_bytes(tmp_path / image_path("black_swan", 2, 6), b"half a PNG")
    store.write_bytes(tmp_path / "black_swan-0002" / "holiday.png", b"not ours, left alone")
    found = list(scan_class(tmp_path, names, 2, PLAN))
    good = {image.record.index: image for _, image in found if image}
    bad = [path for path, image in found if image is None]
    assert sorted(good) == [0, 1]
    assert good[0].record.kept
    assert not good[1].record.kept
    assert sorted(path.name for path in bad) == ["000002.png", "000004.png", "000005.png", "000006.png"]


def test_reading_gives_the_kept_images_by_class_and_index_and_stops_at_a_damaged_one(tmp_path: Path) -> None:
    names = ["a", "b"]
    store.write_json(tmp_path / "plan.json", {"plan": PLAN, "identity": {"classes": names}})
    for class_id, index, kept in ((1, 1, True), (1, 0, True), (0, 12, True), (0, 3, False), (0, 2, True)):
        pixels = image(1, seed=10 * class_id + index)
        record = record_of(pixels, class_id, names[class_id], index, kept)
        store.write_bytes(tmp_path / record.path(), encode_png(pixels, record))
    pixels, labels = read_images(tmp_path)
    assert labels.tolist() == [0, 0, 1, 1]
    assert labels.dtype == np.int64
    assert np.array_equal(pixels, np.stack([image(1, seed) for seed in (2, 12, 10, 11)]))
    (tmp_path / image_path("b", 1, 1)).write_bytes(b"")
    with pytest.raises(DataError, match=r"000001\.png"):
        read_images(tmp_path)


def test_a_folder_without_a_plan_or_without_images_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no synthesized images"):
        read_images(tmp_path)
    store.write_json(tmp_path / "plan.json", {"plan": PLAN, "identity": {"classes": ["a"]}})
    with pytest.raises(DataError, match="no synthesized images"):
        read_images(tmp_path)


def opened(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as read:
        return np.asarray(read)


def test_a_grid_shows_each_image_at_its_place_enlarged_without_blur() -> None:
    images = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 1, 8, 8)
    grid = opened(grid_png(images, columns=2, scale=3))
    assert grid.shape == (2 * 26 + 2, 2 * 26 + 2)
    assert (grid[2:26, 2:26] == 0).all()
    assert (grid[2:26, 28:52] == 128).all()
    assert (grid[28:52, 2:26] == 255).all()


def test_a_grid_of_small_images_is_legible_and_one_of_large_images_is_not_enlarged() -> None:
    assert opened(grid_png(torch.zeros(1, 3, 8, 8), columns=1)).shape == (52, 52, 3)
    assert opened(grid_png(torch.zeros(1, 3, 64, 64), columns=1)).shape == (68, 68, 3)


def test_a_contact_sheet_holds_originals_left_and_generated_right_of_a_gap() -> None:
    red = np.full((3, 8, 8, 3), (255, 0, 0), dtype=np.uint8)
    blue = np.full((12, 8, 8, 3), (0, 0, 255), dtype=np.uint8)
    sheet = opened(contact_sheet([SheetRow("black_swan", red, blue), SheetRow("x" * 500, red[:1], blue[:2])]))
    reds = np.flatnonzero((sheet == (255, 0, 0)).all(2).any(0))
    blues = np.flatnonzero((sheet == (0, 0, 255)).all(2).any(0))
    assert len(reds) == 3 * 48
    assert len(blues) == 10 * 48
    assert reds.max() + 20 < blues.min()
    assert (sheet[0] == 255).all()
    assert (sheet[:, reds.min() - 3 : reds.min()] == 255).all(), "a long name stays out of the images"


@pytest.mark.parametrize("name", ["", "\0\x1b[31m", "黒鳥", "a\nb"])
def test_a_contact_sheet_takes_any_name_and_needs_no_originals(name: str) -> None:
    none = np.empty((0, 8, 8, 1), dtype=np.uint8)
    assert opened(contact_sheet([SheetRow(name, none, image(1)[None])])).shape[2] == 3


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize(("novelty", "start"), [(None, None), (0.75, 7)])
def test_a_dropped_image_comes_back_with_its_reason_and_figures(reason: Reason, novelty: float | None, start: int | None) -> None:
    figures = Figures(0.1, None, 1e-30, novelty)
    record = replace(record_of(image(), kept=False), dropped=reason, figures=figures, start=start)
    assert ({"novelty", "start"} <= set(record.line())) == (start is not None), "older versions knew neither"
    assert decode_png(encode_png(image(), record), record.class_name, "x.png")[1] == record
    assert record.line()["dropped"] == reason


@pytest.mark.parametrize("start", [-1, 1 << 63])
def test_a_start_that_no_training_image_has_is_refused(start: int) -> None:
    record = replace(record_of(image()), start=start)
    with pytest.raises(DataError, match="its text says start="):
        decode_png(encode_png(image(), record), record.class_name, "x.png")


def test_a_reason_that_there_is_not_is_refused() -> None:
    record = replace(record_of(image()), dropped="mood")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="mood"):
        decode_png(encode_png(image(), record), record.class_name, "x.png")


def tile(ratio: float, size: int = 8) -> PairTile:
    return PairTile(np.full((size, size, 3), (0, 0, 255), np.uint8), np.full((size, size, 3), (0, 255, 0), np.uint8), 1.5, ratio)


def test_pairs_stand_side_by_side_and_copies_are_framed_in_red() -> None:
    def red(ratio: float) -> int:
        sheet = opened(pairs_sheet([PairsRow("cat", [tile(ratio)], [])], 1 / 3))
        blue = np.flatnonzero((sheet == (0, 0, 255)).all(2).any(0))
        green = np.flatnonzero((sheet == (0, 255, 0)).all(2).any(0))
        assert (len(blue), len(green), green.min() - blue.max()) == (48, 48, 3)
        return int((sheet == RED).all(2).sum())

    assert red(0.5) == 0
    assert red(0.2) > 4 * 48


@pytest.mark.parametrize(("size", "shown"), [(8, 48), (64, 64), (256, 128)])
def test_pairs_are_shown_at_a_size_to_look_at_even_where_a_class_has_none_by_features(size: int, shown: int) -> None:
    rows = [PairsRow("cat", [tile(0.5, size)] * 3, [tile(0.5, size)]), PairsRow("x" * 500, [tile(0.5, size)], [])]
    sheet = opened(pairs_sheet(rows, 1 / 3))
    blue = (sheet == (0, 0, 255)).all(2)
    assert blue.sum() == 5 * shown * shown
    assert (sheet[:, -10:] == 255).all(), "a margin"
