"""`python tests/agreement.py`: runs the tests that docs/agreement.md names and prints how far each of their comparisons was apart.

What passes is watched: assertions `a < b`, `a <= b` and `a == pytest.approx(b)` of two numbers, torch.testing.assert_close and
numpy.testing.assert_allclose. Of all parameters of a test and all values of a tensor the comparison that came nearest to its limit
counts. The figures of the table are these.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "agreement.md"
NUMBER = r"([-+]?[\d.]+(?:e[-+]?\d+)?)"
BELOW = re.compile(rf"{NUMBER} <=? (?:{NUMBER}|\({NUMBER} \* {NUMBER}\))(?:\n|$)")
ABOUT = re.compile(rf"{NUMBER} == {NUMBER} ± {NUMBER}(?:\n|$)")


class Seen(NamedTuple):
    """The closest that a comparison came to its limit."""

    difference: float
    limit: float
    of: str  # the test's parameters


def named_tests(text: str) -> list[str]:
    """`tests/....py::test_...` of the table, in its order, each once."""
    return list(dict.fromkeys(re.findall(r"`(tests/[\w/]+\.py::\w+)`", text)))


class Watch:
    """A pytest plugin that takes note of what passing tests compared."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str], Seen] = {}
        self.ran: set[str] = set()
        torch.testing.assert_close = self.watched(torch.testing.assert_close, rtol=1.3e-6, atol=1e-5)
        np.testing.assert_allclose = self.watched(np.testing.assert_allclose, rtol=1e-7, atol=0.0)

    def pytest_assertion_pass(self, orig: str, expl: str) -> None:
        if found := BELOW.match(expl):
            self.note(orig, float(found[1]), float(found[2]) if found[2] else float(found[3]) * float(found[4]))
        elif found := ABOUT.match(expl):
            self.note(orig, abs(float(found[1]) - float(found[2])), float(found[3]))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and report.passed:
            self.ran.add(report.nodeid.partition("[")[0])

    def note(self, what: str, difference: float, limit: float) -> None:
        test, _, parameters = os.environ["PYTEST_CURRENT_TEST"].rpartition(" (")[0].partition("[")
        before = self.seen.get((test, what))
        if limit > 0 and (before is None or difference / limit > before.difference / before.limit):
            self.seen[test, what] = Seen(difference, limit, parameters.rstrip("]"))

    def watched(self, compare: Callable[..., None], rtol: float, atol: float) -> Callable[..., None]:
        """A comparison whose limit is rtol |expected| + atol, value by value."""

        def watching(actual: Any, expected: Any, *more: Any, **options: Any) -> None:
            compare(actual, expected, *more, **options)
            r, a = options.get("rtol", rtol), options.get("atol", 0.0 if "rtol" in options and not atol else atol)
            left, right = (
                torch.as_tensor(np.asarray(x) if not isinstance(x, torch.Tensor) else x.detach()).double() for x in (actual, expected)
            )
            difference, limit = torch.broadcast_tensors((left - right).abs(), r * right.abs() + a)
            if difference.numel() and bool((limit > 0).all()):
                at = int((difference / limit).argmax())
                self.note(f"{compare.__name__}, rtol {r:g}, atol {a:g}", float(difference.flatten()[at]), float(limit.flatten()[at]))

        return watching


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        sys.pycache_prefix = folder  # bytecode without the watching code lies beside the tests
        import pytest

        tests, watch = named_tests(DOCUMENT.read_text(encoding="utf-8")), Watch()
        options = [
            "-q",
            "--no-header",
            "-p",
            "no:cacheprovider",
            "-o",
            "enable_assertion_pass_hook=true",
            "-o",
            "verbosity_assertions=2",
            f"--rootdir={ROOT}",
        ]
        code = pytest.main([*options, *(str(ROOT / test) for test in tests)], plugins=[watch])
    for test in tests:
        print(f"\n{test}" + ("" if test in watch.ran else "   DID NOT PASS"))
        for (name, comparison), seen in watch.seen.items():
            if name == test:
                print(f"    {seen.difference:.1e} of {seen.limit:.1e}   {comparison}   {seen.of}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
