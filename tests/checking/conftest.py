"""Pictures that differ as photographs do, and a data set of them in class folders."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

Picture = Callable[..., Image.Image]


@pytest.fixture(scope="session")
def picture() -> Picture:
    """picture(7) -> an RGB image of smooth random shapes, another for every number."""

    def make(number: int, side_px: int = 48) -> Image.Image:
        noise = np.random.Generator(np.random.PCG64(number)).integers(0, 256, (side_px, side_px, 3)).astype(np.uint8)
        blurred = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(side_px / 12))).astype(np.float64)
        low, high = blurred.min(), blurred.max()
        return Image.fromarray(((blurred - low) * 255 / (high - low)).astype(np.uint8))

    return make


@pytest.fixture(scope="session")
def encoded(picture: Picture) -> Callable[..., bytes]:
    """encoded(7, "PNG") -> the file's bytes."""

    def encode(number: int, form: str = "PNG", side_px: int = 48, **options: int) -> bytes:
        buffer = io.BytesIO()
        picture(number, side_px).save(buffer, form, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture
def photos(tmp_path: Path, encoded: Callable[..., bytes]) -> Path:
    """photos/train and photos/test with the classes ant, bee and cat: 6 and 2 images each, all different."""
    for k, name in enumerate(("ant", "bee", "cat")):
        for split, count in (("train", 6), ("test", 2)):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.png").write_bytes(encoded(100 * k + 10 * (split == "test") + i))
    return tmp_path / "photos"
