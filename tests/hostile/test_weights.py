"""Safetensors as a stranger would write them: each fault of the format is a DataError, and costs no more than the file."""

from __future__ import annotations

import json
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import store
from engines.errors import DataError
from engines.networks import inception, pretrained
from engines.store import Checkpoint


def file_of(header: Any, data: bytes = bytes(24), length: int | None = None) -> bytes:
    """A safetensors file with a header, whose length may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(first: int, last: int, shape: list[int], kind: str = "F32") -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [first, last]}


GOOD = {"a": entry(0, 16, [2, 2]), "b": entry(16, 24, [2])}
FAULTS: dict[str, bytes] = {
    "nothing": b"",
    "no header": struct.pack("<Q", 0),
    "a header of 2^63 bytes": file_of(GOOD, length=1 << 63),
    "a header of 100 MB that are not there": file_of(GOOD, length=100_000_000),
    "a header longer than the file": file_of(GOOD, length=4000),
    "a header that is no JSON": file_of(b"{" * 300),
    "a header nested a hundred thousand times": file_of(b"[" * 100_000),
    "a header that is a list": file_of([1, 2]),
    "overlapping tensors": file_of({"a": entry(0, 16, [2, 2]), "b": entry(8, 24, [4])}),
    "a hole": file_of({"a": entry(0, 16, [2, 2]), "b": entry(20, 24, [1])}),
    "offsets that go back": file_of({"a": entry(16, 0, [2, 2])}),
    "offsets beyond the file": file_of({"a": entry(0, 1 << 40, [1 << 38])}),
    "negative offsets": file_of({"a": entry(-16, 0, [2, 2])}),
    "a shape of another size": file_of({"a": entry(0, 24, [2, 2])}),
    "a shape whose product overflows": file_of({"a": entry(0, 24, [1 << 32, 1 << 32, 6])}),
    "a type that there is not": file_of({"a": entry(0, 24, [6], "F7")}),
    "bytes left over": file_of(GOOD, bytes(25)),
    "bytes missing": file_of(GOOD, bytes(23)),
    "metadata that is no text": file_of({"__metadata__": {"diffrc.unet": 1}, **GOOD}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_format_is_a_data_error_and_costs_nothing(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(FAULTS[fault])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (store.read_tensors, pretrained.describe, inception.load):
        with pytest.raises(DataError) as error:
            read(path)
        assert str(path) in error.value.problem
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10


def test_what_the_faults_are_made_of_is_good(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(file_of(GOOD))
    assert {name: tuple(value.shape) for name, value in store.read_tensors(tmp_path / "w.safetensors").items()} == {"a": (2, 2), "b": (2,)}


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"w": torch.ones(2), "more": torch.ones(1)}, "more"),
        ({}, "w"),
        ({"w": torch.ones(3)}, r"\[3\]"),
        ({"w": torch.ones(2, dtype=torch.float64)}, "float64"),
        ({"w": torch.ones(2, dtype=torch.int64)}, "int64"),
    ],
)
def test_a_checkpoint_of_other_tensors_is_told_with_what_differs(tensors: dict[str, torch.Tensor], told: str, tmp_path: Path) -> None:
    store.save_checkpoint(tmp_path, Checkpoint(1, {"model": tensors, "other": {"x": torch.ones(1)}}, {}))
    found = store.load_checkpoint(tmp_path)
    assert found is not None
    with pytest.raises(DataError, match=told):
        found.fitting("model", {"w": torch.ones(2)})
