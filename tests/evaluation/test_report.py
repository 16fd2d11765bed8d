"""The report of a run: one file, nothing from outside, everything escaped, complete even where parts are missing."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines import store
from engines.data.longtail import LongTail, prepare
from engines.evaluation.accuracy import Comparison, Interval, Row, Summary, Table
from engines.evaluation.report import Parts, collect, render, render_study, write_report
from engines.evaluation.report.page import duration, png_width
from engines.evaluation.report.tiles import LARGEST_PX, encoded
from engines.recipe import METHODS, DataSection, Recipe
from engines.store import RunFolder
from engines.synthesis.sheet import Record, encode_png, pixels_sha256

Full = Callable[..., Parts]
VOID = {"meta", "img", "br", "wbr", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags are nested, and keeps text, tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, dict[str, str]]] = []
        self.values: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.append((tag, {name: value or "" for name, value in attrs}))
        self.values += [value or "" for _, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open and self.open[-1] != "style" else ""

    def all(self, tag: str) -> list[dict[str, str]]:
        """The attributes of every element of a kind."""
        return [attributes for name, attributes in self.attributes if name == tag]


@pytest.fixture(scope="module")
def both(full_parts: Full, study_document: Callable[[], dict[str, Any]]) -> dict[str, str]:
    """The two kinds of pages."""
    return {"run": render(full_parts()), "study": render_study(study_document())}


# ------------------------------------------------------------------------------------------------- what holds for any page


@pytest.mark.parametrize("kind", ["run", "study"])
def test_a_hostile_name_is_text_and_never_a_tag(both: dict[str, str], kind: str, hostile: str) -> None:
    page = Page(both[kind])
    assert "script" not in page.tags
    assert page.text.count(hostile) >= 5
    assert not [name for _, attributes in page.attributes for name in attributes if name.startswith("on")]


@pytest.mark.parametrize("kind", ["run", "study"])
def test_a_page_loads_nothing_from_anywhere(both: dict[str, str], kind: str) -> None:
    assert not re.search(r"https?:|//[a-z]|@import|url\(", both[kind])
    page = Page(both[kind])
    assert not {"link", "iframe", "script", "object", "base", "form"} & set(page.tags)
    assert all(re.match(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+=*$", image["src"]) for image in page.all("img"))
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@pytest.mark.parametrize("kind", ["run", "study"])
def test_headings_go_down_one_level_at_a_time_and_the_contents_lead_to_every_section(both: dict[str, str], kind: str) -> None:
    page = Page(both[kind])
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.attributes if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert [link["href"] for link in page.all("a")] == [f"#{section['id']}" for section in page.all("section")]
    assert all(section["aria-labelledby"] in ids for section in page.all("section"))


@pytest.mark.parametrize("kind", ["run", "study"])
def test_tables_name_their_rows_and_columns_and_charts_are_described(both: dict[str, str], kind: str) -> None:
    page = Page(both[kind])
    assert {head.get("scope") for head in page.all("th")} == {"col", "row", "rowgroup"}
    assert all(table["aria-label"] for table in page.all("table"))
    assert all("alt" in image for image in page.all("img"))
    charts = [svg for svg in page.all("svg") if "viewbox" not in svg]  # a curve's inner frame has one
    assert charts
    assert all(svg.get("aria-hidden") == "true" or svg.get("aria-label") for svg in charts)


def test_control_characters_and_overrides_of_the_writing_direction_do_not_reach_the_page(full_parts: Full, tmp_path: Path) -> None:
    name = "cat\u202egnp\x00\x1b\ud800"
    text = render(full_parts(("dog", "owl", name)))
    store.write_text(tmp_path / "page.html", text)  # half of a surrogate pair has no UTF-8
    assert "cat\N{REPLACEMENT CHARACTER}gnp" in text
    assert not set("\u202e\x00\x1b\ud800") & set(text)


def luminance(color: str) -> float:
    """WCAG 2.2's relative luminance of #rrggbb."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for_and_marks_have_theirs(scheme: str) -> None:
    style = resources.files("engines.evaluation.report").joinpath("report.css").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\n *\}", style, re.S)[:2])
    colors = light if scheme == "light" else light | dark
    assert len(dark) == len(light)

    def contrast(front: str, back: str) -> float:
        low, high = sorted(luminance(colors[name]) for name in (front, back))
        return (high + 0.05) / (low + 0.05)

    for back in ("paper", "card", "tint"):
        assert contrast("ink", back) >= 7
        assert contrast("muted", back) >= 4.5
    for word in ("helps", "hurts", "ties"):
        assert contrast(word, "card") >= 4.5
    for mark in ("many", "medium", "few", "synthetic", "neutral"):
        assert contrast(mark, "card") >= 3


# ------------------------------------------------------------------------------------------------------ what the run says


def test_the_page_says_the_verdict_the_figures_and_how_to_make_it_again(full_parts: Full, hostile: str) -> None:
    page = Page(render(full_parts()))
    for words in (
        "Synthesis helps",
        "90.0",
        "+4.0",
        "97.5 %",
        "real + replay, same weight",
        "1 min 37 s",
        "New images, or copies?",
        "7.5 % of the generated images are copies by their pixels, 2.5 % of real images",
        "1 too far",
        "75 %",
        "the selection kept 6 of them",
        "Frechet distance",
        "1.71 to 1.99",
        "\N{MINUS SIGN}0.0123",
        "96.1 %",
        "the distance is not an FID",
        "Expected calibration error",
        "300 test images",
        "t = 333, ECE 10.0 %",
        "17 s a point gained on the few classes with cross-entropy",
        "34" * 32,
    ):
        assert words in page.text, words
    path = json.dumps(f"my photos {hostile}")
    command = f"diffrc run digits-lt --set synth.steps=20 --set 'data.path={path}' --set 'unet.channel_mult=[1, 2, 4]'"
    assert command in page.text


def test_only_a_known_inception_file_makes_the_distance_an_fid(full_parts: Full) -> None:
    parts = full_parts()
    known = replace(parts, trust={**parts.trust, "extractor": {"name": "Inception", "is_fid": True}})
    assert "Frechet distance" not in (text := Page(render(known)).text)
    assert "FID" in text


def test_a_recipe_that_is_none_of_the_embedded_ones_is_run_from_its_file(full_parts: Full) -> None:
    text = Page(render(replace(full_parts(), embedded="", changes=()))).text
    assert "diffrc run demo.toml" in text
    assert "What differs" not in text


def test_no_price_is_given_for_a_gain_within_the_uncertainty(full_parts: Full) -> None:
    parts = full_parts()
    for comparison in parts.table["comparisons"]:
        comparison["interval"] = {"difference": 4.0, "low": -1.0, "high": 9.0}
    assert "No price of a point" in render(parts)


def test_the_best_figure_of_each_block_is_bold_and_the_best_std_is_the_smallest(full_parts: Full) -> None:
    evaluated = full_parts().table
    rows = [row for row in evaluated["rows"] if (row["variant"], row["method"]) == ("synthetic", "cross_entropy")]
    rows[0]["figures"] = json.loads(json.dumps(rows[0]["figures"]))
    rows[0]["figures"]["few"]["mean"], rows[0]["figures"]["std"]["mean"] = 95.0, 3.0
    text = render(Parts("demo", table=evaluated))
    assert "<b>95.0</b>" in text
    assert "<b>3.0</b>" in text
    assert text.count("<b>90.0</b>") == 4  # the block of balanced softmax: all equal, all best


def test_of_eleven_ways_of_training_each_has_a_row_and_the_controls_are_folded(full_parts: Full) -> None:
    parts = full_parts(methods=METHODS)
    text = render(parts)
    shown, _, hidden = text.partition("<summary>Every row, with the controls</summary>")
    assert "LDAM" in shown
    assert "real + replay, same weight" not in shown.partition('<section id="gains"')[2]
    assert hidden.count('scope="rowgroup"') == len(METHODS)
    assert ">cRT<" in hidden  # no heading makes it CRT
    assert text.count("<summary>Every control</summary>") == 1


def test_the_table_of_a_real_evaluation_is_shown_with_the_interval_of_each_class() -> None:
    figures = {column: Summary(50.0, 1.0, 3) for column in ("many", "few", "all", "std", "ece")}
    rows = tuple(Row(variant, "crt", figures, (50.0, None)) for variant in ("real", "replay", "replay_as_synthetic", "synthetic"))
    gain = Interval(2.0, 1.0, 3.0)
    comparisons = tuple(Comparison("crt", "synthetic", v, gain, (gain, None)) for v in ("real", "replay", "replay_as_synthetic"))
    table = Table(("cat", "dog"), ("many", "few"), (9, 2), (0, 7), 30, 0, 3, "few", rows, comparisons, None)
    page = Page(render(Parts("demo", table=json.loads(json.dumps(table.to_json())))))
    assert table.to_json()["verdict"] in page.text
    assert "[+1.0 to +3.0]" in page.text
    assert [line["class"] for line in page.all("line") if line.get("class", "").startswith("band")] == ["band many"]


@pytest.mark.parametrize("missing", [name for name in Parts.__dataclass_fields__ if name != "name"])
def test_a_missing_part_leaves_a_whole_page(full_parts: Full, missing: str) -> None:
    Page(render(Parts(**{key: value for key, value in vars(full_parts()).items() if key != missing})))


def test_a_run_that_was_not_evaluated_says_what_to_type() -> None:
    page = Page(render(Parts("demo")))
    assert "diffrc evaluate" in page.text
    assert "diffrc train" in page.text


def test_a_run_from_before_a_rows_method_had_that_name_is_shown(tmp_path: Path, full_parts: Full) -> None:
    run = RunFolder(tmp_path, Recipe(name="demo"))
    old = full_parts().table
    for entry in (*old["rows"], *old["comparisons"]):
        entry["loss"] = entry.pop("method")
    store.write_json(run.evaluation / "accuracy.json", old)
    assert "Balanced softmax" in Page(render(collect(run))).text


# --------------------------------------------------------------------------------------------------------- many classes


def test_a_thousand_classes_make_a_page_of_bounded_size_that_says_what_it_leaves_out(full_parts: Full) -> None:
    names = tuple(f"class {k} of a data set with long names" for k in range(1200))
    text = render(full_parts(names, METHODS))
    page = Page(text)
    assert len(text) < 3_000_000
    for words in (
        "1,170 more classes between",
        "1,197 classes are left out",
        "1,187 more in the table",
        "200 more in evaluation/accuracy.json",
    ):
        assert words in page.text, words
    columns = text.partition('<svg class="chart columns"')[2].partition("</svg>")[0]
    assert columns.count("<rect") <= 2 * 240


# -------------------------------------------------------------------------------------------------------------- pictures


def test_a_large_image_is_reduced_and_a_small_one_is_kept_pixel_by_pixel() -> None:
    random = np.random.default_rng(0)
    small, large = (random.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in (32, 256))

    def decoded(source: str) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))

    assert np.array_equal(np.asarray(decoded(encoded(small))), small)
    assert decoded(encoded(large)).size == (LARGEST_PX, LARGEST_PX)


def test_a_picture_that_is_damaged_is_named_so_and_not_embedded(full_parts: Full) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(buffer, format="PNG")
    assert png_width(buffer.getvalue()) == 60
    for damaged in (buffer.getvalue()[:40], b'"><script>', b""):
        assert png_width(damaged) == 0
    text = render(Parts("demo", sheets=[("sheet", b'"><script>')]))
    assert "script" not in text
    assert "is damaged" in text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0891, "0.089 s"), (9.6, "9.6 s"), (59.7, "1 min 00 s"), (61, "1 min 01 s"), (3599.6, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_a_duration_is_told_in_the_units_that_people_use(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# ------------------------------------------------------------------------------------------------------------ the folder


@pytest.fixture(scope="module")
def digits() -> LongTail:
    data = DataSection(source="digits", image_size_px=8, image_channels=1, test_per_class=50, head_count=24, imbalance=8.0)
    return prepare(data, None, for_training=False)


def filled(path: Path, tail: LongTail) -> RunFolder:
    """A run folder with two kept images and a dropped one of the last class; the first of them is a copy of a real one."""
    run = RunFolder(path, Recipe(name="demo"))
    store.write_json(path / "classes.json", tail.table())
    members = np.flatnonzero(tail.train.labels == 9)
    pixels = tail.train.pixels(members[:1])[0]
    for index, dropped in enumerate(("", "", "confidence")):
        record = Record("plan", 9, "nine", index, 0, pixels_sha256(pixels), "{}", dropped=dropped)  # type: ignore[arg-type]
        store.write_bytes(run.synth / record.path(), encode_png(pixels, record))
        store.append_json(run.synth / "manifest.jsonl", record.line())
    closest = {"file": "nine-0009/000000.png", "real": tail.train.origin(int(members[0])), "mirrored": True, "distance": 0.0, "ratio": 0.0}
    share = {"images": 2, "copies": 1, "share": 0.5}
    found = {"class": "nine", "pixel": {**share, "real": share, "warns": True, "closest": [closest, {**closest, "real": "gone"}]}}
    document = {"copy_ratio": 1 / 3, "generated": {"pixel": share}, "real": {"pixel": share}, "classes": [found], "warnings": []}
    store.write_json(run.synth / "copies.json", document)
    for name in ("contact-sheet.png", "copies.png"):
        store.write_bytes(run.synth / name, encode_png(pixels, record))
    return run


def test_with_its_data_a_run_shows_originals_generated_and_dropped_images_and_the_nearest_real_ones(
    tmp_path: Path, digits: LongTail
) -> None:
    parts = collect(filled(tmp_path, digits), digits)
    (gallery,), (closest,) = parts.galleries, parts.closest
    assert (gallery.class_id, gallery.side_px) == (9, 8)
    assert len(gallery.originals) == min(5, int(digits.counts[9]))
    assert [tile.words for tile in gallery.dropped] == ["confidence"]
    assert gallery.generated[0].source == gallery.generated[1].source == gallery.originals[0].source
    (pair,) = closest.pairs["pixel"]
    real = digits.train.pixels(np.flatnonzero(digits.train.labels == 9)[:1])[0]
    assert pair.generated.warns
    assert pair.real.source == encoded(real[:, ::-1])
    text = render(parts)
    assert "Framed: a copy" in text
    assert "original images left" not in text  # the sheet would show them twice


def test_without_its_data_or_with_other_data_a_run_shows_the_sheets_of_its_synthesis(tmp_path: Path, digits: LongTail) -> None:
    run = filled(tmp_path, digits)
    other = replace(digits, kept_sha256="0" * 64)
    for tail in (None, other):
        parts = collect(run, tail)
        assert parts.closest == []
        assert not parts.galleries[0].originals
        page = Page(render(parts))
        assert len([image for image in page.all("img") if image["alt"]]) == 2


def test_an_image_that_is_damaged_is_left_out_and_that_is_said(tmp_path: Path, digits: LongTail) -> None:
    run = filled(tmp_path, digits)
    store.write_bytes(run.synth / "nine-0009" / "000000.png", b"no picture")
    parts = collect(run, digits)
    assert len(parts.galleries[0].generated) == 1
    assert parts.closest == []
    assert "1 image could not be read and is left out" in render(parts)


def test_an_image_that_is_gone_is_left_out(tmp_path: Path, digits: LongTail) -> None:
    run = filled(tmp_path, digits)
    (run.synth / "nine-0009" / "000000.png").unlink()
    parts = collect(run, digits)
    assert len(parts.galleries[0].generated) == 1
    assert parts.closest == []


def test_the_report_of_a_run_folder_holds_what_the_folder_holds(tmp_path: Path, full_parts: Full) -> None:
    run = RunFolder(tmp_path, Recipe(name="demo"))
    full = full_parts(("cat", "dog", "eel"))
    store.write_json(tmp_path / "classes.json", {"names": ["cat", "dog", "eel"], "counts": [6, 5, 4], "groups": ["many", "medium", "few"]})
    store.write_json(run.evaluation / "accuracy.json", full.table)
    store.write_json(run.evaluation / "trust.json", full.trust)
    store.write_json(run.stage("guide") / "accuracy.json", {"t": [0, 999], "accuracy": [0.9, 0.1]})
    store.append_json(run.stage("source") / "metrics.jsonl", {"step": 50, "loss": 0.5})
    for index, kept in enumerate((True, True, False)):
        store.append_json(run.synth / "manifest.jsonl", {"class_id": 2, "index": index, "kept": kept})
    store.append_json(run.synth / "manifest.jsonl", {"class_id": 1, "index": 0, "kept": False, "dropped": "confidence"})
    store.write_bytes(run.synth / "contact-sheet.png", full.pairs)
    store.write_bytes(run.synth / "copies.png", full.pairs)
    store.write_json(run.synth / "copies.json", full.copies)
    run.add_cost("synth", 3.0)
    embedded = Recipe(name="demo", seed=7)
    parts = collect(run, None, embedded)
    assert parts.made == {1: (1, 0), 2: (3, 2)}
    assert parts.dropped == {1: {"confidence": 1}}
    assert parts.pairs == full.pairs
    assert parts.trust == full.trust
    assert parts.guide == {"": {"t": [0, 999], "accuracy": [0.9, 0.1]}}
    assert parts.changes == [("seed", 7, 0)]
    assert [caption for caption, _ in parts.sheets] == ["contact sheet"]
    assert write_report(run, None, embedded) == tmp_path / "report" / "index.html"
    text = Page(run.report.read_text(encoding="utf-8")).text
    assert "Where the guide sees" in text
    assert "diffrc run demo --set seed=0" in text
