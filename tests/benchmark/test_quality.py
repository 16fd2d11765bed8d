"""Cells of samplers and steps: made once, judged alike, resumed; the table, the advice and the chart."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines import store
from engines.benchmark import quality
from engines.benchmark.quality import Estimate, Quality, Real, Row, Setting, advice, bench_quality, evaluations, settings_of, tail_classes
from engines.benchmark.quality_picture import curves, quality_png
from engines.data.longtail import LongTail, prepare
from engines.errors import ConflictError, Interrupted, UsageError
from engines.evaluation.fidelity import bootstrap
from engines.interrupt import StopRequest
from engines.recipe import load
from engines.store import RunFolder
from engines.synthesis.sheet import read_images

TORCH = ("synth.engine=torch",)


@pytest.fixture
def run(tiny_copy: Path) -> RunFolder:
    return store.open_run(tiny_copy, TORCH)


@pytest.fixture(scope="module")
def longtail(tiny_run: Path) -> LongTail:
    return prepare(store.open_run(tiny_run).recipe.data, None)


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "bootstrap", partial(bootstrap, resamples=5))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the image folders that were worked on."""
    names: list[str] = []
    work = quality.make_folder

    def spy(folder: Path, *arguments: Any, **named: Any) -> Any:
        names.append(folder.name)
        return work(folder, *arguments, **named)

    monkeypatch.setattr(quality, "make_folder", spy)
    return names


def estimate(value: float, spread: float = 0.01) -> Estimate:
    return Estimate(value, spread)


def row(sampler: str = "ddpm", steps: int = 250, frechet: float = 1.0, hit: float = 95.0, diversity: float = 0.9, **other: Any) -> Row:
    """A cell whose figures have a spread of 0.01, and so has what it loses against a Frechet distance of 1, 95 % and 0.9."""
    measures = {"frechet": estimate(frechet), "hit_rate": estimate(hit), "diversity": estimate(diversity)}
    loss = {"frechet": estimate(frechet - 1), "hit_rate": estimate(95 - hit), "diversity": estimate(0.9 - diversity)}
    plain = {"loss": loss, "scale": 0.2, "evaluations": steps, "images": 70, "not_finite": 0, "engine": "onnx fp32", "folder": "x"}
    return Row(
        **{"sampler": sampler, "steps": steps, "seconds_per_image": steps / 100, "frechet_train": estimate(2), **plain, **measures, **other}
    )


def table(*rows: Row) -> Quality:
    real = Real(350, 127, estimate(0.5), 1.2, 93.0, 0.8)
    return Quality(("seven", "eight"), 70, "resnet8", "Frechet distance", real, rows, len({r.scale for r in rows}) > 1, "quality.png")


def test_a_cell_holds_as_many_images_of_each_class_and_the_table_is_kept(run: RunFolder, longtail: LongTail) -> None:
    classes = tail_classes(run)
    found = bench_quality(run, longtail, settings_of(["ddim", "ddpm"], [2]), classes, 3 * len(classes) - 1)
    assert [(r.sampler, r.steps, r.evaluations) for r in found.rows] == [("ddim", 2, 2), ("ddpm", 2, 2)]
    folder = run.path / "bench" / "quality"
    for cell in found.rows:
        _, labels = read_images(folder / "images" / cell.folder)
        assert dict(zip(*np.unique(labels, return_counts=True), strict=True)) == dict.fromkeys(classes, 3)
        assert cell.images == found.images == 3 * len(classes)
        assert cell.seconds_per_image
        assert min(cell.frechet.value, cell.diversity.value) > 0
        assert 0 <= cell.hit_rate.value <= 100
    assert store.read_json(folder / "quality.json") == json.loads(json.dumps(found.to_json()))
    assert Image.open(io.BytesIO(Path(found.chart).read_bytes())).format == "PNG"
    assert (found.real.test_images, found.real.train_images) == (4 * len(classes), int(longtail.counts[classes].sum()))
    assert found.real.frechet.value > 0
    best = min(found.rows, key=lambda r: r.frechet.value)
    assert set(best.loss.values()) == {Estimate(0.0, 0.0)}
    for cell in found.rows:
        assert cell.loss["hit_rate"].value == pytest.approx(best.hit_rate.value - cell.hit_rate.value)
        assert cell.loss["diversity"].value == pytest.approx(min(best.diversity.value, 1) - min(cell.diversity.value, 1))


def test_a_second_call_makes_only_what_is_missing(run: RunFolder, longtail: LongTail, made: list[str]) -> None:
    classes = tail_classes(run)[:2]
    first = bench_quality(run, longtail, settings_of(["ddim"], [2]), classes, 4)
    assert len(made) == 1
    more = bench_quality(run, longtail, settings_of(["ddim", "dpmpp_2m"], [2]), classes, 4)
    assert [name.split("-")[0] for name in made] == ["ddim", "dpmpp_2m"]
    assert more.rows[0] == first.rows[0]


def test_more_images_are_added_to_those_that_are_there_and_fewer_are_their_first(run: RunFolder, longtail: LongTail) -> None:
    classes = tail_classes(run)[:2]
    few = bench_quality(run, longtail, [Setting("ddim", 2)], classes, 4)
    before = {path: path.stat().st_mtime_ns for path in (run.path / "bench").rglob("0000*.png")}
    many = bench_quality(run, longtail, [Setting("ddim", 2)], classes, 8)
    assert (few.rows[0].images, many.rows[0].images) == (4, 8)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    shutil.rmtree(run.path / "bench" / "quality" / "cells")
    again = bench_quality(run, longtail, [Setting("ddim", 2)], classes, 4)
    assert (again.rows[0].frechet, again.rows[0].hit_rate) == (few.rows[0].frechet, few.rows[0].hit_rate)


def test_another_network_or_scale_or_judge_makes_another_cell(run: RunFolder, longtail: LongTail, made: list[str]) -> None:
    classes, setting = tail_classes(run)[:2], Setting("ddim", 2)
    bench_quality(run, longtail, [setting], classes, 4)
    bench_quality(run, longtail, [replace(setting, scale=0.01)], classes, 4)
    assert len(set(made)) == 2
    judged = run.recipe.model_copy(update={"recognizer": run.recipe.recognizer.model_copy(update={"lr": 0.01})})
    bench_quality(RunFolder(run.path, judged), longtail, [setting], classes, 4)
    assert (len(made), len(set(made))) == (3, 2), "the same images, looked at by another"


def test_the_selection_of_the_recipe_has_no_part(run: RunFolder, longtail: LongTail, made: list[str]) -> None:
    classes = tail_classes(run)[:2]
    picky = store.open_run(run.path, (*TORCH, "select.distance_band=0.001", "select.confidence=0.999", "select.max_tries=1"))
    assert bench_quality(picky, longtail, [Setting("ddim", 2)], classes, 4).rows[0].images == 4
    bench_quality(run, longtail, [Setting("ddim", 2)], classes, 4)
    assert len(set(made)) == 1


def test_a_signal_ends_the_work_after_a_cell_and_the_same_command_goes_on(
    run: RunFolder, longtail: LongTail, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    classes, settings = tail_classes(run)[:2], settings_of(["ddim"], [2, 3])
    write = store.write_json
    stops: list[StopRequest] = []
    catch = quality.catch_signals

    class Caught:
        def __enter__(self) -> StopRequest:
            self.block = catch()
            stops.append(self.block.__enter__())
            return stops[-1]

        def __exit__(self, *failure: Any) -> None:
            self.block.__exit__(*failure)

    def signal_after_a_cell(path: Path, value: Any) -> None:
        write(path, value)
        if path.parent.name == "cells":
            stops[-1].signal_number = 2

    with monkeypatch.context() as patch:
        patch.setattr(quality, "catch_signals", Caught)
        patch.setattr(store, "write_json", signal_after_a_cell)
        with pytest.raises(Interrupted, match="1 of 2 cells"):
            bench_quality(run, longtail, settings, classes, 4)
    assert len(bench_quality(run, longtail, settings, classes, 4).rows) == 2
    assert len(made) == 2


def test_what_cannot_be_measured_is_refused_before_any_work(run: RunFolder, longtail: LongTail, made: list[str]) -> None:
    classes = tail_classes(run)
    with pytest.raises(UsageError, match="fewer than two for each"):
        bench_quality(run, longtail, [Setting("ddim", 2)], classes, len(classes) - 1)
    with pytest.raises(UsageError, match="cannot give"):
        bench_quality(run, longtail, [Setting("ddim", 2), Setting("ddpm", 100_000)], classes, 100)
    with pytest.raises(UsageError, match="head class"):
        bench_quality(run, longtail, [Setting("ddim", 2)], [0, *classes], 100)
    bare = replace(longtail, test=longtail.test.subset(np.flatnonzero(longtail.test.labels != classes[0])))
    with pytest.raises(UsageError, match="fewer than two images"):
        bench_quality(run, bare, [Setting("ddim", 2)], classes, 100)
    other = replace(longtail, kept_sha256="of other images")
    with pytest.raises(ConflictError):
        bench_quality(run, other, [Setting("ddim", 2)], classes, 100)
    assert made == []
    assert not (run.path / "bench").exists()


def test_classes_are_the_tail_or_those_that_were_named(run: RunFolder) -> None:
    groups = run.classes()["groups"]
    assert [groups[k] for k in tail_classes(run)] == [group for group in groups if group != "many"]
    assert tail_classes(run, ("Nine", "four")) == [4, 9]
    with pytest.raises(UsageError, match="nien"):
        tail_classes(run, ("nien",))


def test_classifier_free_guidance_evaluates_twice_where_it_acts() -> None:
    text = 'name = "x"\n[unet]\nclass_cond = true\n[synth]\nsteps = 10\nguidance_interval = [0, 500]\n'
    assert evaluations(load(text)) == 10
    assert evaluations(load(text, ("synth.classifier_free_scale=1.0",))) == 15


def test_the_advice_is_the_cheapest_cell_that_cannot_be_told_from_the_best() -> None:
    found = advice(table(row(), row("dpmpp_2m", 20, frechet=1.015, hit=95.0), row("ddim", 10, frechet=1.4)))
    assert found.startswith("Take dpmpp_2m at 20 steps (")
    assert "ddpm at 250 steps" in found
    assert "12.5 times the evaluations and 12 times the seconds" in found


@pytest.mark.parametrize("worse", [{"frechet": 1.1}, {"hit": 90.0}, {"diversity": 0.5}])
def test_what_is_worse_in_any_measure_is_not_advised(worse: dict[str, float]) -> None:
    cheap = row("ddim", 10, **{"frechet": 1.001, **worse})
    assert advice(table(row(), cheap)).startswith("Best is ddpm at 250 steps")


def test_scales_are_named_where_they_differ() -> None:
    both = table(row(), row("ddim", 10, scale=0.5))
    assert "s = 0.5" in advice(both)
    assert set(curves(both.to_json())) == {"ddpm, s = 0.2", "ddim, s = 0.5"}
    assert "s =" not in advice(table(row(), row("ddim", 10)))


def test_the_chart_has_the_colors_of_its_samplers_and_room_for_any_table() -> None:
    blue, red = (0x2F, 0x6D, 0xB3), (0xC2, 0x41, 0x3B)

    def seen(quality: Quality) -> set[Any]:
        image = Image.open(io.BytesIO(quality_png(quality.to_json()))).convert("RGB")
        return {color for _, color in image.getcolors(image.width * image.height)}

    assert {blue, red} <= seen(table(row(), row("ddim", 10), row(steps=10, frechet=2)))
    alone = seen(table(row(seconds_per_image=None)))
    assert blue in alone
    assert red not in alone
