"""`diffrc data check`: its table, JSON, page, exit codes and the list it writes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Call = Callable[..., Any]
HOSTILE = "<script>alert('x')<:script> [red]"
FOLDER = ("data", "check", "--recipe", "folder", "--data", "photos", "--set", "data.groups=ranks", "--set", "data.group_sizes=[1,0,1]")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """photos/train and photos/test with two classes, one of a hostile name: 4 and 1 images each, all different."""
    noise = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3)).astype(np.uint8)
    pictures = iter(Image.fromarray(grid).resize((64, 64), Image.Resampling.BICUBIC) for grid in noise)
    for name in ("cat", HOSTILE):
        for split, count in (("train", 4), ("test", 1)):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                next(pictures).save(folder / f"{i}.png")
    return tmp_path / "photos"


def leak(photos: Path) -> None:
    (photos / "test" / "cat" / "leak.png").write_bytes((photos / "train" / "cat" / "1.png").read_bytes())


def test_a_sound_folder_exits_0_and_says_so(call_in_empty: Call, photos: Path) -> None:
    code, out, err = call_in_empty(*FOLDER)
    assert code == 0, err
    assert "folder: 8 training images in 2 classes, 2 test images" in out
    assert "sizes: 64x64 (10) -> 64 px. formats: PNG RGB (10)" in out
    assert "nothing found that is wrong" in out
    assert re.search(r"10 images in [\d.]+ s", out)


def test_an_unreadable_image_exits_3_with_a_way_out_that_works(call_in_empty: Call, photos: Path) -> None:
    (photos / "train" / "cat" / "bad.png").write_bytes(b"")
    code, out, err = call_in_empty(*FOLDER, "--quarantine", "list.json")
    assert code == 3
    assert "cannot be read: 1 (data.on_bad_image = error)\n  photos/train/cat/bad.png is empty (0 bytes)" in out
    assert "error: an image cannot be read: photos/train/cat/bad.png is empty (0 bytes)" in err
    assert "--set data.quarantine=quarantine.json" in err
    assert json.loads(Path("list.json").read_text())["leave_out"] == {"train/cat/bad.png": "unreadable: empty"}
    code, out, err = call_in_empty(*FOLDER, "--set", "data.quarantine=list.json")
    assert code == 0, err
    assert "left out beforehand by list.json: 1" in out
    assert "left out by list.json: 1" in call_in_empty("data", "show", *FOLDER[2:], "--set", "data.quarantine=list.json").out


def test_a_leak_exits_3_only_when_strict(call_in_empty: Call, photos: Path) -> None:
    leak(photos)
    code, out, _ = call_in_empty(*FOLDER)
    assert code == 0
    assert "leak: 1 pair of images, one for training, one for testing (1 and 1 images)" in out
    assert "same file: train/cat/1.png = test/cat/leak.png" in out
    code, _, err = call_in_empty(*FOLDER, "--strict")
    assert code == 3
    assert "error: 1 pair of equal or nearly equal images: one for training, one for testing" in err
    assert "--leave-out leaks" in err


def test_json_is_one_document_whatever_the_names(call_in_empty: Call, photos: Path) -> None:
    leak(photos)
    code, out, _ = call_in_empty(*FOLDER, "--json", "--strict")
    table = json.loads(out)
    assert code == 3
    assert table["alike"]["leak"] == {"pairs": 1, "images": 2}
    assert table["leaking"] == {"train": 1, "test": 1}
    assert {row["name"] for row in table["classes"]} == {"cat", HOSTILE}
    assert len(out.splitlines()) == 1


def test_the_page_is_one_file_without_script_or_network_and_with_both_pictures_of_a_pair(call_in_empty: Call, photos: Path) -> None:
    leak(photos)
    (photos / "train" / HOSTILE / "<img src=x onerror=y>.png").write_bytes(b"no image")
    assert call_in_empty(*FOLDER, "--html", "check.html").code == 3
    page = Path("check.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=y&gt;.png" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert page.count('src="data:image/png') == 2
    assert "prefers-color-scheme: dark" in page
    assert "Training would stop: an image cannot be read" in page


def test_what_to_leave_out_needs_a_list_to_go_to(call_in_empty: Call, photos: Path) -> None:
    code, _, err = call_in_empty(*FOLDER, "--leave-out", "repeats")
    assert code == 2
    assert "--quarantine FILE" in err


@pytest.mark.parametrize("option", ["--html", "--quarantine"])
def test_only_what_an_earlier_check_wrote_is_replaced(call_in_empty: Call, photos: Path, option: str) -> None:
    assert [call_in_empty(*FOLDER, option, "out").code for _ in range(2)] == [0, 0]
    mine = photos / "train" / "cat" / "1.png"
    before = mine.read_bytes()
    code, out, err = call_in_empty(*FOLDER, option, str(mine))
    assert (code, out) == (5, "")
    assert "no earlier check wrote it" in err
    assert mine.read_bytes() == before


def test_a_check_imports_no_torch(diffrc: Callable[..., Any], photos: Path) -> None:
    done = diffrc(*FOLDER[:6], "--set", "data.groups=ranks", "--set", "data.group_sizes=[1,0,1]", PYTHONPROFILEIMPORTTIME="1")
    assert "engines.checking.check" in done.stderr
    assert " torch\n" not in done.stderr
