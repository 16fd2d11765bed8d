"""A GPU whose memory runs short while images are made: once is survived with the same images, twice is a stop that can be resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engines.backends.base import Engine
from engines.backends.device import OutOfMemory
from engines.errors import EngineError
from engines.synthesis.maker import Maker
from engines.synthesis.plan import ImageId
from engines.synthesis.synthesize import make_folder

IMAGES = [ImageId(0, index) for index in range(5)]
MakeMaker = Callable[..., Maker]


class Short:
    """An engine that fails at some of its evaluations, counted from 0."""

    def __init__(self, engine: Engine, fails: Callable[[int], bool], failure: Exception) -> None:
        self.engine, self.fails, self.failure = engine, fails, failure
        self.calls = 0

    @property
    def card(self) -> Any:
        return self.engine.card

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls += 1
        if self.fails(self.calls - 1):
            raise self.failure
        return self.engine(x, t, y)


def short(maker: Maker, fails: Callable[[int], bool], failure: Exception | None = None) -> Maker:
    failure = failure or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    return dataclasses.replace(maker, engine=Short(maker.engine, fails, failure))


def test_a_batch_that_ran_out_of_memory_once_is_drawn_again_to_the_same_pixels(make_maker: MakeMaker) -> None:
    maker = make_maker()
    expected = maker.draw(IMAGES, lambda _: None)
    found = short(maker, lambda call: call == 1).draw(IMAGES, lambda _: None)
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(found, expected, strict=True))


def test_out_of_memory_twice_says_what_to_do(make_maker: MakeMaker) -> None:
    with pytest.raises(OutOfMemory, match="too little memory for a batch, twice: CUDA out of memory") as failure:
        short(make_maker(), lambda _: True).draw(IMAGES, lambda _: None)
    assert failure.value.exit_code == 4
    assert "--set synth.batch_size=N with a smaller N and another --out DIR" in failure.value.remedy


def test_a_gpu_that_is_lost_is_an_error_that_is_not_tried_again(make_maker: MakeMaker) -> None:
    maker = short(make_maker(), lambda _: True, RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might ..."))
    with pytest.raises(EngineError, match=r"the GPU failed: CUDA error: unspecified launch failure$") as failure:
        maker.draw(IMAGES, lambda _: None)
    assert (failure.value.exit_code, maker.engine.calls) == (4, 1)  # type: ignore[attr-defined]


def test_a_mistake_of_our_own_is_no_failure_of_a_gpu(make_maker: MakeMaker) -> None:
    with pytest.raises(RuntimeError, match="size of tensor"):
        short(make_maker(), lambda _: True, RuntimeError("The size of tensor a (3) must match")).draw(IMAGES, lambda _: None)


def test_a_job_that_ran_out_of_memory_goes_on_with_the_same_command(make_maker: MakeMaker, tmp_path: Path) -> None:
    maker, wanted = make_maker(), {0: 7, 2: 6}
    make_folder(tmp_path / "whole", maker, wanted)
    with pytest.raises(OutOfMemory):
        make_folder(tmp_path / "broken", short(maker, lambda call: call >= 4), wanted)
    before = {path.name for path in (tmp_path / "broken").rglob("*.png")}
    assert 0 < len(before) < 13
    make_folder(tmp_path / "broken", maker, wanted)

    def images(folder: str) -> dict[str, bytes]:
        root = tmp_path / folder
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("0*.png")}

    assert images("broken") == images("whole")
