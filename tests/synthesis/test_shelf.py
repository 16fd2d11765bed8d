"""What a shelf remembers of its images, and the queue of those to be made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from engines.recipe import load
from engines.synthesis.plan import ImageId, Plan
from engines.synthesis.select import REASONS, Figures, Reason
from engines.synthesis.sheet import Record
from engines.synthesis.shelf import Queue, Records, Shelf

FIGURES = st.builds(Figures, *(st.none() | st.floats(0, 1e9) for _ in Figures._fields))


@given(
    figures=st.lists(FIGURES, min_size=1, max_size=6),
    reasons=st.lists(st.sampled_from(["", *REASONS]), min_size=6, max_size=6),
    starts=st.lists(st.none() | st.integers(0, 1 << 40), min_size=6, max_size=6),
)
def test_a_record_is_remembered_exactly_whatever_made_it(figures: list[Figures], reasons: list[Reason], starts: list[int | None]) -> None:
    records, expected = Records(), {}
    for i, figure in enumerate(figures):
        sha256 = hashlib.sha256(bytes([i])).hexdigest()
        expected[10**8 + i] = Record("plan", 3, "swan", 10**8 + i, 7, sha256, f'{{"torch": "{i % 2}"}}', figure, reasons[i], starts[i])
    records.update(expected)
    assert dict(records) == expected
    assert (len(records), 10**8 in records, 5 in records) == (len(figures), True, False)
    del records[10**8]
    assert 10**8 not in records


@given(batch_size=st.integers(1, 40), wanted=st.dictionaries(st.integers(0, 30), st.integers(0, 60), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_no_batch_has_two_images_in_one_row_and_all_batches_together_have_each_image_once(batch_size: int, wanted: dict[int, int]) -> None:
    batches = batches_of(wanted, batch_size)
    assert all(len({image.row(batch_size) for image in batch}) == len(batch) for batch in batches)
    made = sorted(image for batch in batches for image in batch)
    assert made == sorted(ImageId(k, i) for k, n in wanted.items() for i in range(n))


def test_many_classes_fill_batches_well() -> None:
    """Rows are fixed by class and index, and still nearly every row of a batch is used."""
    wanted = {3: 83, 4: 96, 5: 105, 6: 111, 7: 115, 8: 118, 9: 120}
    assert len(batches_of(wanted, 32)) <= 1.1 * sum(wanted.values()) / 32 + 1


def test_a_queue_of_a_million_images_names_those_that_are_next() -> None:
    queue = queue_of(dict.fromkeys((3, 8), 500000), 32)
    for _ in range(5):
        assert len(queue.batch()) == 32
        assert sum(map(len, queue._rows)) <= 2 * 32
    assert (queue.missing, queue.total) == (1_000_000, 1_000_000)


def batches_of(wanted: Mapping[int, int], batch_size: int) -> list[list[ImageId]]:
    """What an empty folder's queue hands out."""
    return list(iter(queue_of(wanted, batch_size).batch, []))


def queue_of(wanted: Mapping[int, int], batch_size: int) -> Queue:
    recipe = load('name = "test"', (f"synth.batch_size={batch_size}", "synth.max_bad=0"))
    shelf = Shelf(Path(), Plan({}, {}), {k: {} for k in wanted})
    return Queue(shelf, wanted, recipe)
