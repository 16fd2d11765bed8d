"""The page of a study: the paper's figures beside ours, differences, curves, panels, cost; whatever is missing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from engines.evaluation.report import render_study

Document = Callable[[], dict[str, Any]]


def test_the_papers_figures_stand_beside_ours_in_a_column_of_their_own(study_document: Document) -> None:
    text = render_study(study_document())
    head = text.partition('aria-label="Accuracy of every arm"><thead>')[2].partition("</thead>")[0]
    assert head.count(">paper<") == 2  # of few and all, which the paper has; not of the others
    assert text.count("<td><i>82.8</i></td>") == 1  # in the first method's block alone
    assert "<td><i>71.3</i></td>" in text


def test_a_difference_is_drawn_with_its_interval_under_the_arm_that_it_is_compared_with(study_document: Document) -> None:
    text = render_study(study_document()).partition('<section id="differences"')[2].partition("</section>")[0]
    assert text.count("<h4>Against arm real</h4>") == 2  # once for each way of training
    assert "arm no-pair: ties" in text
    assert "[\N{MINUS SIGN}2.0 to +4.0]" in text


def test_a_curve_has_our_points_with_error_bars_and_the_papers_without(study_document: Document) -> None:
    plot = render_study(study_document()).partition('<div class="plot measured">')[2].partition("</svg>")[0]
    assert plot.count('<circle class="c0"') == 3
    assert plot.count('<circle class="c5"') == 2
    assert plot.count('<line class="whisker c0"') == 3


def test_a_sheet_is_embedded_where_it_is_a_picture_and_named_damaged_where_not(study_document: Document) -> None:
    text = render_study(study_document())
    assert text.count("<img ") == 1
    assert text.count("is damaged") == 1


def test_each_arm_has_a_bar_of_what_a_seed_of_it_took_on_one_scale(study_document: Document) -> None:
    bars = render_study(study_document()).partition('<section id="cost"')[2].partition("<details")[0]
    assert re.findall(r'<div class="figure">(.*?)</div>', bars) == ["1 min 06 s", "11 min 40 s"]
    assert [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)%"', bars)] == pytest.approx(
        [6100 / 700, 500 / 700, 100], abs=1e-3
    )


def test_a_study_is_headed_by_its_best_arm_and_what_that_gains(study_document: Document) -> None:
    head = render_study(study_document()).partition("<main>")[0]
    assert "84.0 %" in head
    assert "It against arm real" in head
    assert "+4.0" in head


def test_two_controls_are_compared_once_and_not_both_ways(study_document: Document) -> None:
    document = study_document()
    document["against"] = ["real", "no-pair"]
    difference = {"difference": -1.0, "low": -4.0, "high": 2.0, "outcome": "ties"}
    for row in document["arms"][0]["rows"]:
        row["against"] = {"no-pair": difference}
    text = render_study(document)
    assert "Against arm real" in text
    assert "Against arm no-pair" not in text


def test_the_command_the_changes_and_the_split_are_told(study_document: Document) -> None:
    text = render_study(study_document())
    assert "diffrc study table3 --recipe" in text
    assert "<code>target.lambda_pair=0</code>" in text
    assert "held out to choose settings on" in text


@pytest.mark.parametrize(
    "missing", ["title", "recipe", "hardware", "versions", "seeds", "test", "column", "methods", "arms", "curves", "notes", "command"]
)
def test_a_missing_field_leaves_a_whole_page(study_document: Document, missing: str) -> None:
    document = study_document()
    del document[missing]
    assert render_study(document).endswith("</html>\n")


@pytest.mark.parametrize("missing", ["title", "changes", "images", "seconds", "paper", "rows", "fidelity", "sheet_png"])
def test_a_missing_field_of_every_arm_leaves_a_whole_page(study_document: Document, missing: str) -> None:
    document = study_document()
    for arm in document["arms"]:
        arm.pop(missing, None)
    assert render_study(document).endswith("</html>\n")


def test_an_empty_document_says_that_nothing_is_finished() -> None:
    assert "Nothing is finished yet" in render_study({})
