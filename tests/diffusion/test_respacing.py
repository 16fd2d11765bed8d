"""Which timesteps a sampler visits: facts of the published notations."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.diffusion.respacing import spaced_timesteps
from engines.diffusion.schedule import make_schedule, respace


def test_250_of_1000_are_evenly_spaced_from_the_first_to_the_last() -> None:
    kept = spaced_timesteps(1000, 250)
    assert (len(kept), kept[0], kept[-1]) == (250, 0, 999)
    assert kept[:4] == [0, 4, 8, 12]
    assert kept[124:126] == [497, 502]  # a stride of 999 / 249
    assert spaced_timesteps(1000, "250") == kept


def test_ddim50_takes_every_twentieth_timestep_from_0() -> None:
    assert spaced_timesteps(1000, "ddim50") == list(range(0, 1000, 20))
    assert spaced_timesteps(1000, "ddim1000") == list(range(1000))
    assert spaced_timesteps(10, "ddim4") == [0, 3, 6, 9]  # 10 is no multiple of 4


def test_sections_are_thirds_of_t_with_so_many_timesteps_each() -> None:
    kept = spaced_timesteps(300, "10,15,20")
    assert kept[:10] == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    assert kept[10:25] == [100, 107, 114, 121, 128, 135, 142, 150, 157, 164, 171, 178, 185, 192, 199]
    assert (len(kept), kept[25], kept[-1]) == (45, 200, 299)
    assert spaced_timesteps(10, "4,3,3") == list(range(10))  # the first section has the timestep that is over


def test_a_single_step_of_a_section_is_its_last() -> None:
    assert spaced_timesteps(1000, 1) == [999]
    assert spaced_timesteps(9, "1,1,1") == [2, 5, 8]


def test_a_place_midway_goes_to_the_even_timestep() -> None:
    assert spaced_timesteps(1000, 21)[10] == 500  # 499.5; the published code has 499
    assert spaced_timesteps(4, 3) == [0, 2, 3]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 400), st.data())
def test_timesteps_increase_strictly_and_lie_in_their_sections(total: int, data: st.DataObject) -> None:
    sections = data.draw(st.integers(1, min(total, 6)))
    counts = [data.draw(st.integers(1, total // sections)) for _ in range(sections)]
    kept = spaced_timesteps(total, ",".join(map(str, counts)))
    assert len(kept) == sum(counts)
    assert all(a < b for a, b in pairwise(kept))
    assert kept[0] >= 0
    assert kept[-1] == total - 1


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        (0, "1000 timesteps cannot give 0"),
        (1001, "1000 timesteps cannot give 1001"),
        ("10,501", "a section of 500 timesteps cannot give 501"),
        ("10,0,5", "a section of 333 timesteps cannot give 0"),
        ("ddim999", "no whole stride through 1000 timesteps gives 999"),
        ("ddim0", "no whole stride through 1000 timesteps gives 0"),
    ],
)
def test_what_cannot_be_given_says_why(steps: int | str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        spaced_timesteps(1000, steps)


@pytest.mark.parametrize("steps", [250, "ddim50", "10,15,25"])
def test_a_respaced_schedule_stands_at_those_timesteps(steps: int | str) -> None:
    assert respace(make_schedule("cosine", 1000), steps).timesteps.tolist() == spaced_timesteps(1000, steps)
