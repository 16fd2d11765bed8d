"""Torch: the reference, and what differs from it (half precision, compiled code), held to it at every start."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from engines.backends import torch_engine
from engines.backends.base import example_input, relative_error
from engines.backends.gate import limits_of
from engines.backends.torch_engine import TorchEngine, held_engine
from engines.errors import EngineError, ParityError
from engines.networks.unet import UNet
from engines.recipe import ExportSection

T = 50
BATCH = 5
LIMITS = ExportSection()
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


@pytest.fixture
def compiled_as_it_is(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """torch.compile that leaves a network as it is, quickly; what it was asked for."""
    asked: list[dict[str, Any]] = []

    def leave(network: nn.Module, **how: Any) -> nn.Module:
        asked.append(how)
        return network

    monkeypatch.setattr(torch, "compile", leave)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return asked


def test_bf16_is_held_to_eager_float32_and_tells_how_far_it_is(make_unet: Callable[..., UNet]) -> None:
    engine = held_engine(make_unet(), T, BATCH, LIMITS, "bf16", compiled=False)
    assert (engine.card.kind, engine.card.precision, engine.card.tolerance) == ("torch", "bf16", LIMITS.bf16_one_step_tolerance)
    assert 1e-4 < engine.card.one_step_error < LIMITS.bf16_one_step_tolerance
    x, t, y = example_input(engine.card, BATCH, 3)
    found = engine(x, t, y)
    assert found.dtype == torch.float32
    assert relative_error(found, TorchEngine(make_unet(), T, BATCH)(x, t, y)) < LIMITS.bf16_one_step_tolerance


def test_the_network_that_is_given_stays_float32(make_unet: Callable[..., UNet]) -> None:
    unet = make_unet()
    TorchEngine(unet, T, BATCH, precision="bf16")
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}


@pytest.mark.parametrize("spoil", [1e-1, float("nan")])
def test_half_precision_that_disagrees_is_refused_with_the_numbers(
    spoil: float, make_unet: Callable[..., UNet], monkeypatch: pytest.MonkeyPatch
) -> None:
    cast = torch_engine.cast_unet

    def spoiled(unet: UNet, precision: Any) -> UNet:
        network = cast(unet, precision)
        if precision != "fp32":
            network.register_forward_hook(lambda module, inputs, output: output * (1 + spoil))
        return network

    monkeypatch.setattr(torch_engine, "cast_unet", spoiled)
    with pytest.raises(ParityError, match=r"torch in bf16 disagrees .* (0\.1|nan) .* 0\.02 allowed") as failure:
        held_engine(make_unet(), T, BATCH, LIMITS, "bf16", compiled=False)
    assert failure.value.exit_code == 6
    assert "export.bf16_one_step_tolerance" in failure.value.remedy


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds a GPU")
def test_fp16_is_for_gpus(make_unet: Callable[..., UNet]) -> None:
    with pytest.raises(EngineError, match="fp16 on a GPU alone"):
        TorchEngine(make_unet(), T, BATCH, precision="fp16")


def test_compiled_code_runs_full_batches_and_gives_the_rows_that_were_asked_for(
    make_unet: Callable[..., UNet], compiled_as_it_is: list[dict[str, Any]]
) -> None:
    sizes: list[int] = []
    unet = make_unet()
    unet.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    engine = TorchEngine(unet, T, BATCH, compiled=True)
    reference = TorchEngine(make_unet(), T, BATCH)
    for batch in (1, 2, BATCH):
        x, t, y = example_input(engine.card, batch, 3)
        assert relative_error(engine(x, t, y), reference(x, t, y)) < 1e-6
    assert sizes == [BATCH] * 3
    assert compiled_as_it_is == [{"dynamic": False, "options": {"freezing": True}}]


@pytest.mark.usefixtures("compiled_as_it_is")
def test_compiled_code_is_held_on_one_thread_as_it_will_run(make_unet: Callable[..., UNet], monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    unet = make_unet()
    unet.register_forward_hook(lambda module, inputs, output: threads.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert held_engine(unet, T, BATCH, LIMITS, "fp32", compiled=True).compiled
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(threads) == {1}


def test_without_a_compiler_nothing_is_compiled(make_unet: Callable[..., UNet], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(EngineError, match=r"needs a C\+\+ compiler") as failure:
        TorchEngine(make_unet(), T, BATCH, compiled=True)
    assert failure.value.exit_code == 4
    assert "CXX" in failure.value.remedy


def test_a_compilation_that_fails_is_told_in_a_line(make_unet: Callable[..., UNet], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def fail(*_: Any) -> None:
        raise TorchDynamoException("\nCppCompileError: C++ compile error\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    engine = TorchEngine(make_unet(), T, BATCH, compiled=True)
    with pytest.raises(EngineError, match=r"torch\.compile failed: CppCompileError: C\+\+ compile error$"):
        engine(*example_input(engine.card, 1, 0))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_code_that_is_really_compiled_agrees_in_float32_and_from_any_thread(make_unet: Callable[..., UNet]) -> None:
    engine = held_engine(make_unet(), T, BATCH, LIMITS, "fp32", compiled=True)
    assert engine.card.one_step_error <= LIMITS.one_step_tolerance
    example = example_input(engine.card, BATCH, 3)
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        first, *others = pool.map(lambda _: engine(*example), range(4))
    assert all(torch.equal(first, other) for other in others)


@on_gpu
@pytest.mark.parametrize(("precision", "compiled"), [("fp32", False), ("bf16", False), ("fp16", False), ("fp32", True), ("bf16", True)])
def test_gpu_engines_are_within_their_limits(precision: Any, compiled: bool, make_unet: Callable[..., UNet]) -> None:
    engine = held_engine(make_unet().cuda(), T, BATCH, LIMITS, precision, compiled)
    limit = limits_of(LIMITS, precision, on_gpu=True).one_step_tolerance
    x, t, y = example_input(engine.card, BATCH, 3)
    assert relative_error(engine(x, t, y), TorchEngine(make_unet(), T, BATCH)(x, t, y)) < limit
    assert engine(x.cuda(), t.cuda(), None if y is None else y.cuda()).is_cuda
    assert engine.card.device == torch.cuda.get_device_name()


@on_gpu
def test_gpu_graphs_replay_from_any_thread_and_give_tensors_of_their_own(make_unet: Callable[..., UNet]) -> None:
    engine = held_engine(make_unet().cuda(), T, BATCH, LIMITS, "bf16", compiled=True)
    inputs = [example_input(engine.card, BATCH, first_t) for first_t in range(8)]
    alone = [engine(*each) for each in inputs]
    kept = [out.clone() for out in alone]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda each: engine(*each), inputs))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(alone, kept, strict=True))


@on_gpu
def test_gpu_float32_is_no_tf32(make_unet: Callable[..., UNet]) -> None:
    engine, reference = TorchEngine(make_unet().cuda(), T, BATCH), TorchEngine(make_unet(), T, BATCH)
    x, t, y = example_input(engine.card, BATCH, 3)
    assert relative_error(engine(x, t, y), reference(x, t, y)) < 1e-5
