"""`diffrc evaluate` and `diffrc report` on a run whose synthetic images were put there by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diffrc_cli.app import main
from engines import store
from engines.data.longtail import prepare
from engines.networks import inception
from engines.recipe import load
from engines.store import RunFolder
from engines.synthesis.sheet import Record, encode_png, pixels_sha256

RECIPE = """
name = "tiny"
[data]
source = "digits"
image_size_px = 8
image_channels = 1
imbalance = 10.0
head_count = 20
groups = "ranks"
[unet]
channel_mult = [1, 2]
attention_resolutions = [4]
[guide]
channel_mult = [1, 2]
attention_resolutions = [4]
[recognizer]
architecture = "resnet8"
train_steps = 3
batch_size = 8
seeds = 1
horizontal_flip = false
crop_padding_px = 1
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    recipe = load(RECIPE)
    folder = store.create_run(tmp_path / "runs" / "tiny", recipe)
    folder.keep_classes(prepare(recipe.data, None).table())
    return folder


@pytest.fixture
def synthesized(run: RunFolder) -> RunFolder:
    names = run.classes()["names"]
    store.write_json(run.synth / "plan.json", {"plan": "p", "identity": {"classes": names}})
    random = np.random.default_rng(0)
    for class_id in (8, 9):
        for index in range(3):
            pixels = random.integers(0, 255, (8, 8, 1), dtype=np.uint8)
            record = Record("p", class_id, names[class_id], index, 0, pixels_sha256(pixels), "{}")
            store.write_bytes(run.synth / record.path(), encode_png(pixels, record))
            store.append_json(run.synth / "manifest.jsonl", record.line())
    return run


def diffrc(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    captured = capsys.readouterr()
    assert stopped.value.code == code, captured.err
    return captured.out, captured.err


def test_evaluate_prints_every_variant_and_a_verdict_and_keeps_the_table(
    synthesized: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = diffrc(capsys, "evaluate", "--run", str(synthesized.path))
    assert out.splitlines()[-1] == f"next: diffrc report --run {synthesized.path}"
    for words in ("real + replay", "real + synthetic", "balanced softmax", "few", "std", "calibration error", "purity", "95 % intervals"):
        assert words in out
    for words in ("Can these images be trusted?", "Frechet distance", "KID", "recall", "taken for their class", "no FID"):
        assert words in out
    trust = store.read_json(synthesized.evaluation / "trust.json")
    assert trust["images"] == 6
    assert [entry["images"] for entry in trust["per_class"]] == [3, 3]
    kept = json.loads((synthesized.evaluation / "accuracy.json").read_text())
    assert kept["verdict"] in out
    assert kept["synthetic_counts"][8:] == [3, 3]
    assert synthesized.cost()["evaluate"] > 0


def test_seeds_on_the_command_line_win_and_json_is_one_line(synthesized: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = diffrc(capsys, "evaluate", "--run", str(synthesized.path), "--seeds", "2", "--json")
    assert out.count("\n") == 1
    table = json.loads(out)
    assert table["seeds"] == 2
    assert table["trust"] == store.read_json(synthesized.evaluation / "trust.json")
    assert {row["figures"]["few"]["n"] for row in table["rows"]} == {2}
    assert "seeds = 2" in (synthesized.path / "recipe.toml").read_text()


def test_features_of_no_inception_file_are_refused_before_any_work(
    synthesized: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.write_bytes(tmp_path / "weights.pth", b"PK\x03\x04 and more")
    for name, problem, remedy in (("nowhere", "cannot read", "diffrc import"), ("weights.pth", "torch checkpoint", "weights.pth")):
        _, err = diffrc(capsys, "evaluate", "--run", str(synthesized.path), "--features", str(tmp_path / name), code=3)
        assert problem in err
        assert remedy in err
    assert not (synthesized.evaluation / "cells").exists()


def test_the_word_fid_stands_where_the_published_inception_judged_and_nowhere_else(
    synthesized: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inception, "_STEM", (inception.Conv("Conv2d_1a_3x3", 4, (3, 3), 2),))
    monkeypatch.setattr(inception, "_BLOCKS", {"Mixed_7c": ((inception.Conv("branch1x1", 8),),)})
    monkeypatch.setattr(inception, "FEATURES", 8)
    weights = inception.Inception().state_dict()
    for sha256, words in ((f"6726825d{'0' * 56}", "FID  "), ("1" * 64, "not the published weights); no FID, comparable")):
        inception.write(tmp_path / "i.safetensors", weights, inception.InceptionCard("i.pth", sha256))
        out, _ = diffrc(capsys, "evaluate", "--run", str(synthesized.path), "--features", str(tmp_path / "i.safetensors"))
        assert words in out
        assert ("Frechet distance" in out) == (sha256[0] == "1")
        assert store.read_json(synthesized.evaluation / "trust.json")["extractor"]["is_fid"] == (sha256[0] == "6")


def test_a_run_without_synthetic_images_says_what_to_type(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = diffrc(capsys, "evaluate", "--run", str(run.path), code=2)
    assert "no synthesized images yet" in err
    assert "diffrc synth --fill" in err


def test_a_run_that_was_not_trained_says_what_to_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = store.create_run(tmp_path / "runs" / "tiny", load(RECIPE))
    _, err = diffrc(capsys, "evaluate", "--run", str(folder.path), code=2)
    assert "diffrc train" in err


def test_another_long_tail_than_the_trained_one_is_refused(synthesized: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = diffrc(capsys, "evaluate", "--run", str(synthesized.path), "--set", "data.imbalance=5.0", code=2)
    assert "data.imbalance" in err


def test_report_writes_one_page_before_and_after_evaluation(synthesized: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = diffrc(capsys, "report", "--run", str(synthesized.path))
    assert str(synthesized.report) in out
    assert "Not evaluated yet" in synthesized.report.read_text()
    diffrc(capsys, "evaluate", "--run", str(synthesized.path))
    diffrc(capsys, "report", "--run", str(synthesized.path))
    assert "Purity by an oracle" in synthesized.report.read_text()
