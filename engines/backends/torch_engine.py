"""Torch: the reference, a U-Net evaluated eagerly in float32; and the same network in half precision, compiled, or both."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engines.backends.base import EngineCard, Precision, check_input, package_versions, weights_sha256
from engines.backends.cast import cast_unet
from engines.backends.device import device_name, exact_float32, one_thread_each
from engines.backends.gate import limits_of, one_step_error
from engines.errors import EngineError, ParityError, first_line
from engines.networks.unet import UNet
from engines.recipe import ExportSection

WARM_UPS = 3  # before a graph is recorded: libraries choose kernels and allocate at first
UNCOMPILED = "leave synth.compile out"

Evaluate = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class TorchEngine:
    """See `Engine`. Threads may call it side by side; compiled for a GPU, they run in turn.

    In float32 and not compiled it is the reference, and other engines are held to it. Otherwise it is one of those others.

    Args:
        unet: in evaluation mode and float32, on any device.
        timesteps: T of its training.
        max_batch: the largest batch a caller may ask for.
        precision: "bf16" and "fp16" are `cast_unet`'s.
        compiled: by torch.compile, for batches of exactly `max_batch`: smaller ones are filled up. On a GPU also recorded as a CUDA
            graph, on a CPU with the weights as constants. The first evaluation takes minutes.

    Raises: EngineError where the device has not the precision, or what torch.compile needs is not here.
    """

    def __init__(
        self, unet: UNet, timesteps: int, max_batch: int, recipe_sha256: str = "", precision: Precision = "fp32", compiled: bool = False
    ) -> None:
        assert not unet.training, "dropout would make the numbers random"
        self.unet = unet
        self.compiled = compiled
        self._device = next(unet.parameters()).device
        self._card = torch_card(unet, timesteps, max_batch, recipe_sha256, precision)
        require_precision(precision, self._device)
        self._network = cast_unet(unet, precision)
        if precision != "fp32":
            self._network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._evaluate: Evaluate = _compiled(self._network, self._device) if compiled else self._network.__call__
        self._graph: _Graph | None = None
        self._turn = threading.Lock()

    @property
    def card(self) -> EngineCard:
        """What it is."""
        return self._card

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self._device

    def measured(self, tolerance: float, one_step_error: float) -> None:
        """Put on the card what it was held to and found."""
        self._card = self._card.model_copy(update={"tolerance": tolerance, "one_step_error": one_step_error})

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """See `Engine.__call__`."""
        check_input(self._card, x, t, y)
        here = (x.to(self._device), t.to(self._device), None if y is None else y.to(self._device))
        with exact_float32(self._device):
            out = self._at_full_batch(*here) if self.compiled else self._evaluate(*here)
        return out.float().to(x.device)

    def _at_full_batch(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        rows = torch.arange(self._card.max_batch, device=x.device) % len(x)
        full = (x[rows], t[rows], None if y is None else y[rows])
        if self._device.type != "cuda":
            return self._evaluate(*full)[: len(x)]
        with self._turn:
            self._graph = self._graph or _Graph(self._evaluate, full, self._device)
            return self._graph(full)[: len(x)]


class _Graph:
    """An evaluation recorded as a CUDA graph: it replays fixed addresses, so inputs are copied in and the output copied out.

    Recorded here and not by torch.compile, whose own graphs belong to the thread that made them.
    """

    def __init__(self, evaluate: Evaluate, example: tuple[Tensor, Tensor, Tensor | None], device: torch.device) -> None:
        self._inputs = tuple(None if value is None else value.clone() for value in example)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                evaluate(*self._inputs)  # type: ignore[arg-type]
        torch.cuda.current_stream(device).wait_stream(stream)
        self._recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._recorded, capture_error_mode="thread_local"):
            self._output = evaluate(*self._inputs)  # type: ignore[arg-type]

    def __call__(self, inputs: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
        for held, value in zip(self._inputs, inputs, strict=True):
            if held is not None and value is not None:
                held.copy_(value)
        self._recorded.replay()
        return self._output.clone()


def held_engine(unet: UNet, timesteps: int, batch: int, settings: ExportSection, precision: Precision, compiled: bool) -> TorchEngine:
    """The engine in half precision, compiled, or both, held to eager float32 now: no card of before speaks for it.

    Args:
        batch: of synthesis; no other will do.
        settings: whose limits it is held to.

    Returns: it, with what was measured on its card.

    Raises:
        EngineError: the device has not the precision, or torch.compile fails or misses what it needs.
        ParityError: its numbers are not those of eager float32.
    """
    engine, reference = TorchEngine(unet, timesteps, batch, "", precision, compiled), TorchEngine(unet, timesteps, batch)
    limits = limits_of(settings, precision, engine.device.type == "cuda")
    with one_thread_each():  # as in synthesis: compiled code is for a number of threads
        error = one_step_error(engine, reference, batch)
    if not error <= limits.one_step_tolerance:  # also where it is not a number
        raise ParityError(
            f"torch in {precision}{', compiled,' if compiled else ''} disagrees with eager float32: relative error {error:.2g} of one "
            f"evaluation, {limits.one_step_tolerance:.2g} allowed",
            f"--precision fp32 without synth.compile; or loosen export.{limits.keys[0]}",
        )
    engine.measured(limits.one_step_tolerance, error)
    return engine


def require_precision(precision: Precision, device: torch.device) -> None:
    """Raises EngineError where torch does not compute in a precision on a device."""
    if precision == "fp16" and device.type == "cpu":
        raise EngineError("torch computes in fp16 on a GPU alone here", "--precision bf16; or --device cuda")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise EngineError(f"{device_name(device)} has no bf16", "--precision fp16, or fp32")


def require_compiler(device: torch.device) -> None:
    """Raises EngineError where torch.compile would miss something: a C++ compiler on a CPU, triton and a C compiler on a GPU."""
    on_gpu = device.type == "cuda"
    if on_gpu and importlib.util.find_spec("triton") is None:
        raise EngineError("torch.compile on a GPU needs triton", f"pip install triton, as torch asks for it; or {UNCOMPILED}")
    language, named, usual = ("C", "CC", ("gcc", "clang")) if on_gpu else ("C++", "CXX", ("g++",))
    if not any(shutil.which(name) for name in ((os.environ[named],) if os.environ.get(named) else usual)):
        raise EngineError(
            f"torch.compile needs a {language} compiler, and there is none",
            f"install {usual[0]}, or let {named} name one; or {UNCOMPILED}",
        )


def _compiled(network: UNet, device: torch.device) -> Evaluate:
    require_compiler(device)
    from torch._dynamo.exc import TorchDynamoException  # takes seconds to import

    # A GPU's kernels are not timed against each other: another start could choose others, and round images differently.
    options: dict[str, Any] | None = None if device.type == "cuda" else {"freezing": True}
    with warnings.catch_warnings(action="ignore"):  # torch warns of its own deprecated parts
        compiled = torch.compile(network, dynamic=False, options=options)
    quiet = True  # at the first evaluation it compiles, and warns of TF32 that is off on purpose as well

    def evaluate(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        nonlocal quiet
        try:
            with warnings.catch_warnings(action="ignore") if quiet else contextlib.nullcontext():
                out: Tensor = compiled(x, t, y)
            quiet = False
        except TorchDynamoException as error:
            raise EngineError(f"torch.compile failed: {first_line(error)}", UNCOMPILED) from error
        return out

    return evaluate


def torch_card(unet: UNet, timesteps: int, max_batch: int, recipe_sha256: str = "", precision: Precision = "fp32") -> EngineCard:
    """The card of a network that needs no file. In eager float32 it is its own reference."""
    return EngineCard(
        kind="torch",
        precision=precision,
        recipe_sha256=recipe_sha256,
        weights_sha256=weights_sha256(unet),
        file_sha256="",
        image_size_px=unet.architecture.image_size_px,
        image_channels=unet.architecture.in_channels,
        out_channels=out_channels(unet),
        classes=unet.classes,
        timesteps=timesteps,
        max_batch=max_batch,
        opset=0,
        versions=package_versions(("torch",)),
        device=device_name(next(unet.parameters()).device),
        tolerance=0.0,
        one_step_error=0.0,
        trajectory_psnr_db=0.0,
        self_test=(),
    )


def out_channels(unet: UNet) -> int:
    """C, or 2C with a learned variance."""
    last = unet.out[-1]
    assert isinstance(last, torch.nn.Conv2d)
    return last.out_channels
