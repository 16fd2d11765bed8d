"""diffrc bench quality as people call it: what it prints, and what it says of each mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffrc_cli.app import main
from diffrc_cli.bench_quality import show
from engines.benchmark.quality import Estimate, Quality, Real, Row


@pytest.fixture
def latest(tiny_copy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose latest run is trained, not exported."""
    monkeypatch.chdir(tiny_copy.parent.parent)
    return tiny_copy


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[Any, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(("bench", "quality", *words))
    return end.value.code, *capsys.readouterr()


def test_it_shows_a_line_a_cell_and_an_advice_and_a_chart(latest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--engine", "torch", "--class", "nine", "--class", "eight", "--n", "4", "--samplers", "ddim,dpmpp_2m", "--steps", "2")
    code, out, err = call(capsys, *few)
    assert code == 0, err
    assert "4 images of 2 classes a cell" in out
    for words in ("ddim ", "dpmpp_2m ", "real images", "at 2 steps", "chart: runs/digits-lt/bench/quality/quality.png"):
        assert words in out
    code, out, _ = call(capsys, *few, "--json")
    found = json.loads(out)
    assert [row["sampler"] for row in found["rows"]] == ["ddim", "dpmpp_2m"]
    assert found["advice"]
    assert (latest / "bench" / "quality" / "quality.png").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--samplers", "euler"), "no sampler 'euler'"),
        (("--steps", "10,many"), "'many' is no number of steps"),
        (("--steps", "0"), "'0' is no number of steps"),
        (("--steps", ","), "names nothing"),
        (("--scales", "a"), "are no numbers"),
        (("--scales", "nan"), "guidance_scale"),
        (("--class", "nien"), "nien"),
        (("--n", "3"), "fewer than two"),
    ],
)
def test_a_mistake_is_told_with_its_remedy(latest: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], told: str) -> None:
    code, out, err = call(capsys, "--engine", "torch", *words)
    assert (code, out) == (2, "")
    assert told in err
    assert "try:" in err


def test_a_run_that_is_not_exported_says_what_to_type(latest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "--steps", "2", "--n", "20")
    assert code == 4
    assert "diffrc export" in err


def test_what_was_not_timed_and_several_scales_have_their_place(capsys: pytest.CaptureFixture[str]) -> None:
    figure = Estimate(1.0, 0.25)
    rows = tuple(Row("ddim", 10, scale, 10, 4, 0, "onnx fp32", None, figure, figure, figure, figure, {}, "folder") for scale in (0.1, 0.5))
    show(Quality(("a", "b"), 4, "resnet8", "FID", Real(8, 6, figure, 1.5, 90.0, None), rows, True, "chart.png"))
    out = capsys.readouterr().out
    assert "0.5" in out
    assert "1.00±0.25" in out
