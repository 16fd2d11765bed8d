"""What is seen of one image: damage at any place of a file, facts, and a hash that stays when an image is saved again."""

import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest

from engines.checking.fingerprints import examine, examine_pixels, looks_of

Encoded = Callable[..., bytes]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_file_cut_at_any_place_is_bad_or_told_to_end_early(form: str, encoded: Encoded) -> None:
    whole = encoded(1, form, 8)
    seen = examine([(whole[:length], "x") for length in range(len(whole))])
    assert all(one.kind or one.cut for one in seen)
    assert {one.kind for one in seen} <= {"", "empty", "not an image", "damaged"}
    assert not examine([(whole, "x")])[0].kind
    assert not examine([(whole, "x")])[0].cut


def test_what_follows_the_end_of_a_file_is_no_damage(encoded: Encoded) -> None:
    for form in ("PNG", "JPEG", "GIF"):
        assert not examine([(encoded(1, form, 8) + b"\0" * 100, "x")])[0].cut


def png(width: int, height: int) -> bytes:
    """The header of a PNG of any size, and of its pixels next to nothing."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0), b"IDAT" + zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)


def gif(frames: int) -> bytes:
    """An animation of so many frames of one pixel."""
    frame = b"\x2c\0\0\0\0\x01\0\x01\0\0\x02\x02\x44\x01\0"
    return b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff" + frame * frames + b";"


def test_a_header_that_promises_too_much_is_a_bomb_and_of_an_animation_the_first_frame_counts() -> None:
    bomb, animation, script = examine([(png(65500, 65500), "bomb.png"), (gif(100_000), "many.gif"), (b"%!PS-Adobe-3.0 EPSF-3.0", "x.png")])
    assert bomb.kind == "bomb"
    assert "bomb.png" in bomb.reason
    assert animation.facts is not None
    assert (animation.facts.format, animation.facts.width) == ("GIF", 1)
    assert script.kind == "not an image"


def test_facts_are_those_of_the_file(encoded: Encoded) -> None:
    seen = examine([(encoded(3, "JPEG", 40), "x")])[0]
    assert seen.facts == ("JPEG", "RGB", 40, 40)


def test_the_hash_of_looks_stays_when_an_image_is_saved_again_and_smaller(encoded: Encoded) -> None:
    seen = examine([(encoded(i, form, side, **options), "x") for i in range(20) for form, side, options in WAYS])
    hashes = np.array([one.looks for one in seen], dtype=np.uint64).reshape(20, len(WAYS))
    again = np.bitwise_count(hashes[:, 0] ^ hashes[:, 1])
    others = np.bitwise_count(hashes[:, None, 0] ^ hashes[None, :, 0])[~np.eye(20, dtype=bool)]
    assert again.max() <= 7
    assert others.min() > 7


WAYS = (("PNG", 48, {}), ("JPEG", 48, {"quality": 50}))


def test_flat_images_have_one_hash_whatever_their_gray() -> None:
    flat = np.stack([np.full((32, 32, 3), gray, np.uint8) for gray in (0, 1, 100, 255)])
    assert looks_of(flat).tolist() == [0, 0, 0, 0]


def test_images_that_were_never_files_are_known_by_their_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    pixels[2] = pixels[0]
    seen = examine_pixels(pixels, (8, 8))
    assert seen[0].digest == seen[2].digest != seen[1].digest
    assert seen[0].facts == ("pixels", "uint8", 8, 8)
