"""docs/agreement.md, docs/promises.md and CONTRIBUTING.md keep their word: the tests that they name are there, all slow ones are named."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
AGREEMENT = (ROOT / "docs" / "agreement.md").read_text(encoding="utf-8")
PROMISES = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROWS = [line for line in AGREEMENT.splitlines() if line.startswith("| ") and not line.startswith("| ours |")]


def slowness_of(file: Path) -> dict[str, bool]:
    """Names of a file's test functions, and whether each is marked slow, itself or by one of its parameters."""
    found = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            found[node.name] = any("mark.slow" in ast.unparse(decorator) for decorator in node.decorator_list)
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split(" | ")[0][2:])
def test_a_row_of_the_agreement_says_how_far_within_what_limit_and_by_which_test(row: str) -> None:
    *_, apart, limit, test = (cell.strip() for cell in row.strip("| ").split(" | "))
    assert apart and limit
    named = re.fullmatch(r"`(tests/[\w/]+\.py)::(\w+)`", test)
    assert named
    assert named[2] in slowness_of(ROOT / named[1])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split(" | ")[0][2:])
def test_what_was_apart_lies_within_its_limit(row: str) -> None:
    *_, apart, limit, _ = (cell.strip() for cell in row.strip("| ").split(" | "))
    differences, limits = ([float(number) for number in re.findall(r"(?:^|; )(\d[\d.e-]*)", cell)] for cell in (apart, limit))
    if "of" not in limit and "%" not in limit:  # limits that grow with the value are the test's own affair
        assert all(a <= b for a, b in zip(differences, limits, strict=True))


@pytest.mark.parametrize("title", ["Promises", "Faults", "What the tests notice"])
def test_every_promise_every_fault_and_every_loss_names_tests_that_are_there(title: str) -> None:
    section = PROMISES.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == {"Promises": 16, "Faults": 54, "What the tests notice": 16}[title]
    for row in rows:
        cells = [cell.strip() for cell in row.strip("| ").split(" | ")]
        assert all(cells)
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)(?:\[[^\]]+\])?`", cells[-1])
        assert named and all(test in slowness_of(ROOT / file) for file, test in named), row


def test_contributing_lists_the_files_with_slow_tests_and_no_others() -> None:
    slow = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py") if any(slowness_of(path).values())}
    section = CONTRIBUTING.partition("## Slow tests")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(tests/[\w/]+\.py)`", section)) == slow
