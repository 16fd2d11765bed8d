"""Class names: as people type them, and as folders."""

import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.data.names import find_class, slug
from engines.errors import UsageError

NAMES = ("black_swan", "Japanese spaniel", "cheetah", "great-white-shark")
HOSTILE = [
    "../../x",
    "/etc/x",
    "con",
    "a/b",
    "x.",
    "a" * 10_000,
    "a\0b",
    "\u202egnp",
    "🦢",
    "--help",
    "{0}",
    "[red]x",
    "",
    " ",
    "-rf",
    "..\\x",
]


@pytest.mark.parametrize("typed", ["black_swan", "Black Swan", "black-swan", " BLACK  SWAN ", "black__swan"])
def test_case_blanks_hyphens_and_underscores_are_one(typed: str) -> None:
    assert find_class(typed, NAMES) == 0


def test_a_miss_names_the_nearest_class() -> None:
    with pytest.raises(UsageError, match="no class named 'blackswna'") as error:
        find_class("blackswna", NAMES)
    assert error.value.remedy.startswith("--class black_swan ")


def test_a_miss_with_nothing_near_says_where_the_names_are() -> None:
    with pytest.raises(UsageError) as error:
        find_class("zzz", NAMES)
    assert error.value.remedy == "diffrc data classes lists the classes of this run"


def test_a_name_that_fits_two_classes_is_refused_and_the_exact_one_is_found() -> None:
    names = ("Crane", "crane", "bird")
    with pytest.raises(UsageError, match="fits 2 classes: 'Crane', 'crane'"):
        find_class("CRANE", names)
    assert find_class("crane", names) == 1


def test_composed_and_decomposed_accents_are_one() -> None:
    assert find_class(unicodedata.normalize("NFD", "Müller"), ("a", "müller")) == 1


@settings(deadline=None)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=8, unique=True), st.data())
def test_every_class_is_found_by_its_own_name(names: list[str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(names))
    assert names[find_class(name, names)] == name


@settings(deadline=None)
@given(st.text(max_size=40), st.lists(st.text(max_size=12), max_size=5))
def test_whatever_is_typed_gives_a_class_or_a_usage_error(typed: str, names: list[str]) -> None:
    try:
        assert 0 <= find_class(typed, names) < len(names)
    except UsageError as error:
        assert len(error.problem) < 400


def test_a_slug_is_the_name_and_the_id() -> None:
    assert slug("black_swan", 12) == "black_swan-0012"
    assert slug("Great White-Shark", 3) == "great_white-shark-0003"
    assert slug("🦢", 0) == "class-0000"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_makes_a_plain_folder(name: str) -> None:
    assert re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}-\d{4}", slug(name, 7))


@settings(deadline=None)
@given(st.lists(st.text(max_size=100), max_size=20))
def test_slugs_are_a_bijection_for_any_names(names: list[str]) -> None:
    slugs = [slug(name, k) for k, name in enumerate(names)]
    assert len(set(slugs)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9_-]{1,64}-\d{4}", s) for s in slugs)
    assert [int(s.rsplit("-", 1)[1]) for s in slugs] == list(range(len(names)))
