"""The report: one file, nothing from outside, everything escaped, complete even where parts are missing."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines import store
from engines.evaluation.accuracy import VARIANTS, Comparison, Interval, Purity, Row, Summary, Table
from engines.evaluation.report import Parts, collect, render, write_report
from engines.recipe import Recipe
from engines.store import RunFolder
from engines.training.recognizer import LOSSES

HOSTILE = '<script>alert("1")</script>'
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags are nested, and keeps text, tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.values: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [value or "" for _, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [value or "" for _, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open and self.open[-1] != "style" else ""


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def table(names: tuple[str, ...], few: float = 90.0, interval: Interval | None = None) -> dict[str, Any]:
    figures = {c: Summary(few if c == "few" else 50.0, 1.0, 3) for c in ("many", "medium", "few", "all", "std")}
    rows = tuple(Row(v, loss, figures, (50.0,) * len(names)) for loss in LOSSES for v in VARIANTS)
    interval = interval or Interval(4.0, 1.0, 7.0)
    comparisons = tuple(Comparison(loss, "synthetic", v, interval) for loss in LOSSES for v in VARIANTS if v != "synthetic")
    groups = ("many", *("medium",) * (len(names) - 2), "few")
    counts = tuple(range(2 * len(names), len(names), -1))
    made = (0, *(3,) * (len(names) - 1))
    purity = Purity(97.5, (None, *(97.5,) * (len(names) - 1)), 99.0, 100)
    document: dict[str, Any] = Table(names, groups, counts, made, 30, 0, 3, "few", rows, comparisons, purity).to_json()
    return dict(json.loads(json.dumps(document)))


def copies(name: str) -> dict[str, Any]:
    share = {"images": 40, "copies": 3, "share": 0.075}
    few = {"images": 40, "copies": 1, "share": 0.025}
    found = {**share, "real": few, "warns": True, "closest": []}
    totals = {"generated": {"pixel": share, "feature": share}, "real": {"pixel": few, "feature": few}}
    classes = [{"class": name, "pixel": found, "feature": found}, {"class": "of one image", "pixel": found}]
    return {"copy_ratio": 1 / 3, **totals, "classes": classes, "warnings": [f"{name}: 7.5% of 40 images are copies"]}


def full(names: tuple[str, ...] = ("cat", "dog", HOSTILE)) -> Parts:
    evaluated = table(names)
    return Parts(
        name="demo",
        recipe_toml=f'name = "{HOSTILE}"',
        classes={"names": list(names), "counts": evaluated["counts"], "groups": evaluated["groups"]},
        table=evaluated,
        metrics={
            "source": [{"step": s, "loss": 1 / s} for s in range(1, 40)],
            "guide": [{"step": s, "loss": 1.0, "l_pc": 1.0} for s in (1, 2, 3)],
        },
        guide={"train": {"t": [0, 500, 999], "accuracy": [0.9, 0.6, 0.3]}, "test": {"t": [0, 500, 999], "accuracy": [0.8, 0.5, 0.3]}},
        made={2: (4, 3)},
        dropped={2: {"distance": 1}},
        sheets=[(HOSTILE, png())],
        copies=copies(names[-1]),
        pairs=png(),
        cost={"train.source": 61.0, "synth": 5.0, HOSTILE: 1.0},
        environment={"cpus": 2, "device": "cpu", "packages": {"torch": HOSTILE}},
    )


def test_a_hostile_class_name_is_text_and_never_a_tag() -> None:
    page = Page(render(full()))
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) >= 5


def test_the_page_loads_nothing_from_anywhere() -> None:
    text = render(full())
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    page = Page(text)
    assert not {"link", "iframe", "script", "object"} & set(page.tags)
    assert all(value.startswith("data:image/png;base64,") for value in page.values if value.startswith("data:"))


def test_the_page_says_the_verdict_the_figures_and_how_to_make_it_again() -> None:
    page = Page(render(full()))
    for words in (
        "Synthesis helps",
        "90.0",
        "+4.0",
        "97.5 %",
        "real + replay, same weight",
        "diffrc run demo.toml",
        "1 min 07 s",
        "New images, or copies?",
        "7.5 % of the generated images are copies by their pixels, 2.5 % of real images",
        "1 too far",
        "75 %",
    ):
        assert words in page.text, words


def test_the_best_figure_of_each_block_is_bold_and_the_best_std_is_the_smallest() -> None:
    evaluated = table(("cat", "dog", "eel"))
    ours = next(row for row in evaluated["rows"] if (row["variant"], row["loss"]) == ("synthetic", "cross_entropy"))
    ours["figures"]["few"]["mean"], ours["figures"]["std"]["mean"] = 95.0, 3.0
    text = render(Parts("demo", table=evaluated))
    assert "<b>95.0</b>" in text
    assert "<b>3.0</b>" in text
    assert text.count("<b>90.0</b>") == len(VARIANTS)  # the block of balanced softmax: all equal, all best


@pytest.mark.parametrize(
    "missing",
    ["recipe_toml", "classes", "table", "metrics", "guide", "made", "dropped", "sheets", "copies", "pairs", "cost", "environment"],
)
def test_a_missing_part_leaves_a_whole_page(missing: str) -> None:
    parts = full()
    Page(render(Parts(**{key: value for key, value in vars(parts).items() if key != missing})))


def test_a_run_that_was_not_evaluated_says_what_to_type() -> None:
    page = Page(render(Parts("demo")))
    assert "diffrc evaluate" in page.text
    assert "diffrc train" in page.text


def test_the_guides_calibration_is_shown_as_curves_diagrams_and_a_table_of_the_test_images() -> None:
    levels = [0, 333, 666, 999]
    calibrated = {
        "images": 300,
        "t": levels,
        "accuracy": [0.9, 0.8, 0.5, 0.1],
        "confidence": [0.92, 0.7, 0.6, 0.4],
        "ece": [0.021, 0.1, 0.1, 0.3],
        "nll": [0.31, 0.6, 1.2, 2.3],
        "bins": [[[0.92, 0.9, 1.0]]] * 4,
    }
    page = Page(render(Parts("demo", guide={"train": {**calibrated, "nll": [9.99] * 4}, "test": calibrated})))
    assert page.tags.count("circle") == 3  # a diagram each, but for the last level: nothing left to see
    for words in ("300 test images", "t = 333, ECE 10.0 %", "92.0 %", "0.31"):
        assert words in page.text, words
    assert "9.99" not in page.text


def test_hundreds_of_classes_are_columns_and_a_gap_and_not_a_mile_of_rows() -> None:
    page = Page(render(full(tuple(f"class {k}" for k in range(200)))))
    assert "170 more classes between" in page.text


def test_the_report_of_a_run_folder_holds_what_the_folder_holds(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, Recipe(name="demo"))
    names = ("cat", "dog", "eel")
    store.write_json(tmp_path / "classes.json", {"names": names, "counts": [6, 5, 4], "groups": ["many", "medium", "few"]})
    store.write_json(run.evaluation / "accuracy.json", table(names))
    store.write_json(run.stage("guide") / "accuracy.json", {"t": [0, 999], "accuracy": [0.9, 0.1]})
    store.append_json(run.stage("source") / "metrics.jsonl", {"step": 50, "loss": 0.5})
    for index, kept in enumerate((True, True, False)):
        store.append_json(run.synth / "manifest.jsonl", {"class_id": 2, "index": index, "kept": kept})
    store.append_json(run.synth / "manifest.jsonl", {"class_id": 1, "index": 0, "kept": False, "dropped": "confidence"})
    store.write_bytes(run.synth / "contact-sheet.png", png())
    store.write_bytes(run.synth / "copies.png", png())
    store.write_json(run.synth / "copies.json", copies("eel"))
    run.add_cost("synth", 3.0)
    parts = collect(run)
    assert parts.made == {1: (1, 0), 2: (3, 2)}
    assert parts.dropped == {1: {"confidence": 1}}
    assert parts.pairs == png()
    assert parts.guide == {"": {"t": [0, 999], "accuracy": [0.9, 0.1]}}
    assert [caption for caption, _ in parts.sheets] == ["contact sheet"]
    assert write_report(run) == tmp_path / "report" / "index.html"
    assert "Where the guide sees" in Page(run.report.read_text(encoding="utf-8")).text
