"""Torch in bf16 and compiled as engines of synthesis: held first, told, and named by the plan; on a GPU the images of the CPU."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines import store
from engines.backends.torch_engine import TorchEngine
from engines.errors import EngineError, ParityError
from engines.synthesis.maker import Maker, open_maker
from engines.synthesis.plan import ImageId

TORCH = "synth.engine=torch"


def opened(run: Path, *settings: str) -> tuple[Maker, list[str]]:
    told: list[str] = []
    return open_maker(store.open_run(run, (TORCH, *settings)), "target", tell=told.append), told


def test_bf16_is_told_with_its_distance_and_makes_another_plan(tiny_run: Path) -> None:
    reference, silent = opened(tiny_run)
    maker, told = opened(tiny_run, "synth.precision=bf16")
    assert silent == []
    assert told[0].startswith("engine: torch bf16: one evaluation within ")
    assert told[0].endswith("of eager float32 (allowed 2e-02)")
    assert maker.plan.identity["engine.precision"] == "bf16"
    assert maker.plan.id != reference.plan.id
    assert len(maker.draw([ImageId(0, 0)], lambda _: None)) == 1


def test_bf16_that_disagrees_draws_nothing(tiny_run: Path) -> None:
    with pytest.raises(ParityError, match="torch in bf16 disagrees") as failure:
        opened(tiny_run, "synth.precision=bf16", "export.bf16_one_step_tolerance=1e-9")
    assert failure.value.exit_code == 6


def test_compiled_code_is_named_by_the_plan_and_the_device_only_where_it_is_a_gpu(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    maker, told = opened(tiny_run, "synth.compile=true", "synth.device=cpu")
    assert maker.plan.identity["engine.compiled"] is True
    assert not {"engine.device", "synth.device", "synth.compile"} & set(maker.plan.identity)
    assert told[0] == "engine: torch fp32, compiled: compiling it takes minutes"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a GPU")
@pytest.mark.parametrize(("setting", "words"), [("synth.precision=fp16", "fp16 on a GPU"), ("synth.device=cuda", "0 CUDA devices")])
def test_what_needs_a_gpu_is_refused_without_one(setting: str, words: str, tiny_run: Path) -> None:
    with pytest.raises(EngineError, match=words) as failure:
        opened(tiny_run, setting)
    assert failure.value.exit_code == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
def test_gpu_images_are_those_of_the_cpu_within_a_level(make_maker: Callable[..., Maker]) -> None:
    maker = make_maker()
    assert maker.guide is not None
    engine: Any = maker.engine
    gpu = torch.device("cuda")
    there = dataclasses.replace(maker, engine=TorchEngine(engine.unet.to(gpu), 20, 8), guide=maker.guide.to(gpu), device=gpu)
    try:
        images = [ImageId(k, index) for k, index in ((0, 0), (0, 1), (1, 0), (2, 0))]
        found = there.draw(images, lambda _: None)
    finally:
        engine.unet.to("cpu")
        maker.guide.to("cpu")
    expected = maker.draw(images, lambda _: None)
    levels = np.stack([a.pixels.astype(int) - b.pixels for a, b in zip(found, expected, strict=True) if a.pixels is not None])
    assert (np.abs(levels) <= 1).mean() >= 0.999
    assert there.parallel == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
def test_gpu_runs_are_named_by_the_plan_and_repeat_themselves(tiny_run: Path) -> None:
    maker, _ = opened(tiny_run)
    assert maker.plan.identity["engine.device"] == "cuda"
    first, again = (maker.draw([ImageId(0, 0), ImageId(0, 1)], lambda _: None) for _ in range(2))
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(first, again, strict=True))
