"""The judge of generated images is trained once, kept, and found again by what it was made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines import store
from engines.data.longtail import LongTail, prepare
from engines.errors import DataError
from engines.evaluation import judge
from engines.evaluation.judge import open_judge
from engines.networks import inception
from engines.store import RunFolder


@pytest.fixture
def run(tiny_copy: Path) -> RunFolder:
    return store.open_run(tiny_copy)


@pytest.fixture
def longtail(run: RunFolder) -> LongTail:
    return prepare(run.recipe.data, None)


def test_the_judge_is_trained_once_and_gives_the_same_again(run: RunFolder, longtail: LongTail, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = longtail.test.pixels(np.arange(5))
    first = open_judge(run, longtail)
    monkeypatch.setattr(judge, "train_recognizer", None)  # cannot be called
    second = open_judge(run, longtail)
    assert first.digest == second.digest
    for a, b in zip(first.look(pixels), second.look(pixels), strict=True):
        assert np.array_equal(a, b)


def test_it_gives_a_row_of_features_and_a_label_an_image(run: RunFolder, longtail: LongTail) -> None:
    features, labels = open_judge(run, longtail).look(longtail.test.pixels(np.arange(7)))
    assert (features.shape, features.dtype) == ((7, 64), np.float64)
    assert (labels.shape, labels.dtype) == ((7,), np.int64)


def test_other_settings_and_other_images_make_another_judge(run: RunFolder, longtail: LongTail) -> None:
    section = run.recipe.recognizer
    other = run.recipe.model_copy(update={"recognizer": section.model_copy(update={"lr": 0.05})})
    fewer = replace(longtail, train=longtail.train.subset(np.arange(len(longtail.train) - 1)))
    judges = {open_judge(run, longtail).digest, open_judge(RunFolder(run.path, other), longtail).digest, open_judge(run, fewer).digest}
    assert len(judges) == 3
    weight = run.recipe.model_copy(update={"recognizer": section.model_copy(update={"synthetic_weight": 0.9})})
    assert open_judge(RunFolder(run.path, weight), longtail).digest in judges, "of synthetic images it has seen none"


def test_with_an_inception_file_its_features_count_and_the_recognizers_labels(
    run: RunFolder, longtail: LongTail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inception, "_STEM", (inception.Conv("Conv2d_1a_3x3", 4, (3, 3), 2),))
    monkeypatch.setattr(inception, "_BLOCKS", {"Mixed_7c": ((inception.Conv("branch1x1", 8),),)})
    monkeypatch.setattr(inception, "FEATURES", 8)
    network = inception.Inception().eval()
    names = {}
    for sha256 in ("6726825d" + "0" * 56, "1" * 64):
        card = inception.InceptionCard("inception.pth", sha256)
        inception.write(tmp_path / "i.safetensors", network.state_dict(), card)
        other, own = open_judge(run, longtail, extractor=tmp_path / "i.safetensors"), open_judge(run, longtail)
        pixels = longtail.test.pixels(np.arange(5))
        assert np.array_equal(other.look(pixels)[0], inception.features(network, pixels))
        assert np.array_equal(other.look(pixels)[1], own.look(pixels)[1])
        names[other.digest] = (other.is_fid, other.distance)
        assert own.digest not in names
    (fid, fid_name), (plain, plain_name) = names.values()
    assert (fid, fid_name, plain) == (True, "FID", False)
    assert plain_name.startswith("Frechet distance in the features of Inception-v3 (inception.pth, not the published weights)")


def test_a_damaged_file_is_told(run: RunFolder, longtail: LongTail) -> None:
    open_judge(run, longtail)
    (file,) = (run.evaluation / "judge").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=file.name):
        open_judge(run, longtail)
