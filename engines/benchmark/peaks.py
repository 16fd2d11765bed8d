"""What the machine is and the most it can do: matrix products and a 3x3 convolution, in operations a second; operations of a network."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engines.backends.base import Precision
from engines.backends.device import exact_float32, processors

GEMM_SIZES = (4096, 2048, 1024, 512)
CONV_CHANNELS, CONV_SIZE_PX, CONV_BATCH = 128, 32, 32
GPU_SIZES, GPU_CONV_BATCH = (8192, 4096), 512  # a GPU needs more at once to be busy
MAX_PRODUCT_SECONDS = 1.0  # of one product: a slower machine gets smaller ones
MIN_PRODUCTS = 3
CPUINFO = Path("/proc/cpuinfo")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "bf16", "i8mm", "sve")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Peak(NamedTuple):
    """The best of some runs of one operation."""

    what: Literal["matrix product", "convolution"]
    precision: Precision
    shape: str
    operations_per_second: float
    runs: int


def measure_peaks(device: torch.device, seconds: float = 1.0) -> list[Peak]:
    """The peaks of a device in each precision that engines compute in, by torch, with the threads that it is set to.

    A product is the one that oneDNN makes on a CPU, for torch as for OpenVINO, and cuBLAS on a GPU. fp32 on a GPU is without TF32.

    Args:
        seconds: of measuring each; the best run counts, since a busy machine can only take away.
    """
    on_gpu = device.type == "cuda"
    precisions: tuple[Precision, ...] = ("fp32", "bf16", "fp16") if on_gpu else ("fp32", "bf16")
    sizes, images = (GPU_SIZES, GPU_CONV_BATCH) if on_gpu else (GEMM_SIZES, CONV_BATCH)
    found = []
    with exact_float32(device):
        for precision in precisions:
            size = gemm_size(lambda n: min(_seconds_of(_product(n, precision, device), device, 0.0)), sizes)  # noqa: B023 (called at once)
            times = _seconds_of(_product(size, precision, device), device, seconds)
            found.append(Peak("matrix product", precision, f"{size}^3", 2 * size**3 / min(times), len(times)))
            times = _seconds_of(_convolution(images, precision, device), device, seconds)
            operations = 2 * 9 * CONV_CHANNELS**2 * CONV_SIZE_PX**2 * images
            shape = f"{images} x {CONV_CHANNELS} x {CONV_SIZE_PX} x {CONV_SIZE_PX}, 3x3, channels last"
            found.append(Peak("convolution", precision, shape, operations / min(times), len(times)))
    return found


def gemm_size(seconds_of: Callable[[int], float], sizes: Sequence[int] = GEMM_SIZES) -> int:
    """The largest of some falling sizes whose product takes at most MAX_PRODUCT_SECONDS, going by the time of the smallest."""
    smallest = sizes[-1]
    taken = seconds_of(smallest)
    return next((size for size in sizes if taken * (size / smallest) ** 3 <= MAX_PRODUCT_SECONDS), smallest)


def operations_of(network: Callable[[], object]) -> int:
    """Floating-point operations of a call, counted operator by operator: products, convolutions, attention; a multiply-add is two."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network()
    return int(counter.get_total_flops())


def machine(device: torch.device) -> dict[str, Any]:
    """The processor's name and flags, how many this process may use, memory and system; the GPU where the device is one."""
    text = CPUINFO.read_text(encoding="utf-8", errors="replace") if CPUINFO.is_file() else ""
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    found = {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "model": _model_of(fields),
        "processors": processors(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "gpu": None,
    }
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        found["gpu"] = {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given: a GPU's call returns before its work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _model_of(fields: Mapping[str, str]) -> str:
    """Family, model and stepping, which tell processors apart that a virtual machine gives one name; "" where there are none."""
    named = [(word, fields.get(key, "")) for word, key in (("family", "cpu family"), ("model", "model"), ("stepping", "stepping"))]
    return " ".join(f"{word} {value}" for word, value in named if value)


def _product(size: int, precision: Precision, device: torch.device) -> Callable[[], Tensor]:
    a, b = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
    return lambda: a @ b


def _convolution(images: int, precision: Precision, device: torch.device) -> Callable[[], Tensor]:
    form: dict[str, Any] = {"device": device, "dtype": DTYPES[precision]}
    x = torch.randn(images, CONV_CHANNELS, CONV_SIZE_PX, CONV_SIZE_PX, **form).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(CONV_CHANNELS, CONV_CHANNELS, 3, 3, **form).contiguous(memory_format=torch.channels_last)
    return lambda: F.conv2d(x, weight, padding=1)


@torch.no_grad()
def _seconds_of(run: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Wall-clock seconds of each run, after one that is not timed; at least MIN_PRODUCTS of them."""
    times: list[float] = []
    run()
    synchronize(device)
    began = time.perf_counter()
    while len(times) < MIN_PRODUCTS or time.perf_counter() - began < seconds:
        started = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return times
