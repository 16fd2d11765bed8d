"""Seconds of the networks, apart from all others."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from engines.synthesis.maker import Maker
from engines.synthesis.stopwatch import Spent, Stopwatch
from engines.synthesis.synthesize import make_folder, summary


def test_a_timed_function_is_the_same_function_and_its_calls_add_up() -> None:
    watch = Stopwatch()

    def slow(a: int, *, b: int) -> int:
        time.sleep(0.01)
        return a + b

    timed = watch.timed(slow)
    assert [timed(i, b=1) for i in range(3)] == [1, 2, 3]
    assert 0.03 <= watch.seconds < 3

    def fails() -> None:
        time.sleep(0.01)
        raise ValueError

    with pytest.raises(ValueError):
        watch.timed(fails)()
    assert watch.seconds >= 0.04


def test_the_share_outside_the_network_is_what_is_left_of_the_workers_time() -> None:
    assert (Spent(3.0, 4.0) + Spent(6.0, 6.0) + Spent(worker=2.0)).outside_network == pytest.approx(0.25)
    assert Spent(worker=1.0).outside_network is None, "nothing was drawn"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_tells_its_share_outside_the_network(workers: int, torch_maker: Maker, tmp_path: Path) -> None:
    """An engine that sleeps 20 ms an evaluation is most of the job; one that takes no time is hardly any of it."""

    class Sleeps:
        card = torch_maker.engine.card

        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def __call__(self, x: Any, t: Any, y: Any = None) -> Any:
            time.sleep(self.seconds)
            return x.repeat(1, 2, 1, 1)

    shares = {}
    for seconds in (0.0, 0.1):
        maker = Maker(torch_maker.recipe, torch_maker.plan, "target", Sleeps(seconds), None)
        result = make_folder(tmp_path / str(seconds), maker, {2: 20}, workers=workers)
        shares[seconds] = summary([result])["outside_network"]
        assert 0 < result.spent.network < result.spent.worker
    assert shares[0.1] < 0.6 < shares[0.0] < 1
    assert summary([make_folder(tmp_path / "0.1", maker, {2: 20})])["outside_network"] is None
