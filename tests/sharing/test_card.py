"""The data card: counts, making, trust, limits; nothing of a class name's own becomes YAML, HTML or Markdown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from engines import store
from engines.data.longtail import prepare
from engines.sharing.balanced import Balanced, open_balanced
from engines.sharing.card import card, recipe_digest, yaml_string
from engines.sharing.layouts import FORMATS, Format

SIZES = {"train": {"num_bytes": 10, "num_examples": 226}, "test": {"num_bytes": 5, "num_examples": 40}}


def text_of(balanced: Balanced, layout: Format = "parquet", folds: int = 0) -> str:
    return card(balanced, [balanced.train, balanced.test], layout, SIZES, folds)


def front_matter(text: str) -> Any:
    yaml = pytest.importorskip("yaml", reason="PyYAML, which the hub's own client reads cards with, is not installed")
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_counts_real_and_synthetic_images_by_class_and_group(digits: Balanced) -> None:
    text = text_of(digits)
    assert "| 9 | nine | few | 3 | 21 | 24 | 4 |" in text
    assert "|  | **all** |  | 102 | 124 | 226 | 40 |" in text
    assert "| medium | 4 | 34 | 62 |" in text


@pytest.mark.parametrize("layout", FORMATS)
def test_every_card_says_how_it_was_made_what_not_to_do_and_whose_license_is_missing(layout: Format, digits: Balanced) -> None:
    text = text_of(digits, layout)
    for told in (digits.plan["plan"], recipe_digest(digits.run.recipe), digits.longtail.kept_sha256, "| seed | 7 |", "engine | none"):
        assert told in text
    assert "**Synthetic images are made from the 102 real ones**" in text
    assert "**Do not test on them**" in text
    assert text.startswith("---\nlicense: unknown  # yours to fill in")
    assert "- synthetic\n" in text
    assert str(digits.run.path) not in text


def test_the_front_matter_of_tables_is_what_the_hub_expects(digits: Balanced) -> None:
    facts = front_matter(text_of(digits))
    assert facts["license"] == "unknown"
    assert facts["task_categories"] == ["image-classification"]
    assert facts["size_categories"] == ["n<1K"]
    features = {feature["name"]: feature["dtype"] for feature in facts["dataset_info"]["features"]}
    assert features["image"] == "image"
    assert features["synthetic"] == "bool"
    assert features["label"] == {"class_label": {"names": {str(k): name for k, name in enumerate(digits.names)}}}
    assert [split["num_examples"] for split in facts["dataset_info"]["splits"]] == [226, 40]
    assert facts["configs"][0]["data_files"][0] == {"split": "train", "path": "data/train-*"}


def test_class_names_come_back_from_yaml_as_they_are(hostile: Balanced) -> None:
    facts = front_matter(text_of(hostile))
    names = facts["dataset_info"]["features"][2]["dtype"]["class_label"]["names"]
    assert [names[str(k)] for k in range(len(names))] == list(hostile.names)


def test_a_yaml_string_is_one_line_of_printable_characters() -> None:
    assert yaml_string('a"\\\n\u2028\x85🦢') == '"a\\"\\\\\\n\\U00002028\\U00000085🦢"'


def test_class_names_do_nothing_in_the_text_of_a_card(hostile: Balanced) -> None:
    text = text_of(hostile).split("---\n", 2)[2]
    assert r"\<b\>\|\[x\](y)\`\*" in text
    assert "<b>" not in text
    assert r"two\nlines" in text.replace("\\\\", "\\")
    assert all(c.isprintable() or c == "\n" for c in text)
    rows = [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert len(rows) == len(hostile.names)
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 8 for row in rows)


def test_a_card_without_measurements_says_so_and_one_with_them_shows_those_of_these_images(made_copy: Path) -> None:
    run = store.open_run(made_copy)
    longtail = prepare(run.recipe.data, None)
    balanced = open_balanced(run, longtail)
    assert "Not measured when this was written" in text_of(balanced)
    row = {"variant": "synthetic", "method": "cross_entropy", "figures": {c: {"mean": 51.0, "spread": 2.0, "n": 3} for c in ("few", "all")}}
    counts = balanced.train.counts(10, synthetic=True)
    accuracy = {"verdict": "A tie.", "test_images": 40, "seeds": 3, "synthetic_counts": counts, "rows": [row]}
    interval = {"value": 3.0, "low": 2.5, "high": 3.5}
    trust = {
        "extractor": {"name": "resnet8", "is_fid": False},
        "images": sum(counts),
        "reference_set": "test",
        "frechet": {**interval, "floor": 1.25},
        "kid": interval,
        "recall": None,
        "coverage": 0.5,
        "hit_rate": 91.0,
    }
    store.write_json(run.evaluation / "accuracy.json", accuracy)
    store.write_json(run.evaluation / "trust.json", trust)
    text = text_of(balanced)
    assert "A tie." in text
    assert "| synthetic | cross entropy | 51.0 ± 2.0 | 51.0 ± 2.0 |" in text
    assert "Beside real test images, in the features of resnet8" in text
    assert "| Frechet distance | 3 [2.5, 3.5]; as many real images would score 1.25 |" in text
    assert "| coverage, 0 to 1 | 0.5 |" in text
    assert "recall" not in text
    store.write_json(run.evaluation / "trust.json", trust | {"extractor": {"name": "Inception", "is_fid": True}})
    assert "| FID | 3 [2.5, 3.5]" in text_of(balanced)
    balanced.synthetic_path(9, 0).unlink()  # the figures are not those of what is left
    assert "Not measured when this was written" in text_of(open_balanced(run, longtail))


def test_figures_of_another_kind_than_expected_are_left_out(made_copy: Path) -> None:
    run = store.open_run(made_copy)
    for name in ("accuracy", "trust"):
        store.write_json(run.evaluation / f"{name}.json", [])
    assert "Not measured when this was written" in text_of(open_balanced(run, prepare(run.recipe.data, None)))


def test_the_digest_of_a_recipe_does_not_depend_on_where_the_data_lie(digits: Balanced) -> None:
    recipe = digits.run.recipe
    moved = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": "/elsewhere"})})
    other = recipe.model_copy(update={"seed": 1})
    assert recipe_digest(recipe) == recipe_digest(moved) != recipe_digest(other)


def test_a_selection_and_its_yield_are_told(made_copy: Path) -> None:
    run = store.open_run(made_copy, ("select.distance_band=1.5", "select.novelty_band=[0.75,2.5]", "select.confidence=0.3"))
    row = {"class": "nine", "asked": 21, "kept": 21, "made": 22, "rejected": 1, "yield": 21 / 22}
    store.write_json(run.synth / "yield.json", [row])
    text = text_of(open_balanced(run, prepare(run.recipe.data, None)))
    assert "at most 1.5 class widths" in text
    assert "0.75 to 2.5 times as far from the nearest real one" in text
    assert "at least 0.3 of the guide's probability" in text
    assert "21 of 22 images (95.5 %)" in text
    assert "| nine | 22 | 21 | 95.5 % |" in text
