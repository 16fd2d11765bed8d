"""engines/benchmark/peaks.py: operations by hand, the size of a product that a machine can bear, memory that is a process's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engines import recipe as recipes
from engines.benchmark.peaks import gemm_size, machine, measure_peaks, operations_of
from engines.benchmark.subject import CLASSES, NETWORKS
from engines.networks.unet import parameter_count
from engines.training.diffusion import build_unet
from engines.training.guide import build_guide

ROOT = Path(__file__).parent.parent.parent


def test_a_convolutions_operations_are_two_for_every_weight_and_position() -> None:
    convolution = torch.nn.Conv2d(3, 5, 3, padding=1)
    assert operations_of(lambda: convolution(torch.zeros(2, 3, 8, 8))) == 2 * (5 * 3 * 3 * 3) * (8 * 8) * 2


def test_a_strided_convolution_and_a_linear_layer_add_up() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.nn.Flatten(), torch.nn.Linear(6 * 16, 7))
    assert operations_of(lambda: network(torch.zeros(1, 4, 8, 8))) == 2 * (6 * 4 * 9) * 16 + 2 * (6 * 16) * 7


@pytest.mark.parametrize(("name", "millions"), [("small", 6.08), ("cifar", 38.31)])
def test_the_two_networks_have_the_parameters_that_they_are_known_by(name: str, millions: float) -> None:
    recipe = recipes.load(NETWORKS[name])
    with torch.device("meta"):
        unet = build_unet(recipe, CLASSES)
    assert parameter_count(unet) / 1e6 == pytest.approx(millions, abs=0.005)


def test_their_guide_has_1_39_million() -> None:
    recipe = recipes.load(NETWORKS["small"])
    assert parameter_count(build_guide(recipe, torch.ones(CLASSES).long().numpy())) / 1e6 == pytest.approx(1.39, abs=0.005)


@pytest.mark.parametrize(("gflops", "size"), [(1000.0, 4096), (100.0, 2048), (10.0, 1024), (0.1, 512)])
def test_a_product_is_as_large_as_a_second_allows(gflops: float, size: int) -> None:
    assert gemm_size(lambda n: 2 * n**3 / (gflops * 1e9)) == size


def test_every_precision_has_a_product_and_a_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.benchmark.peaks.GEMM_SIZES", (64,))
    monkeypatch.setattr("engines.benchmark.peaks.CONV_BATCH", 1)
    peaks = measure_peaks(torch.device("cpu"), seconds=0.0)
    assert [(peak.what, peak.precision) for peak in peaks] == [
        (what, precision) for precision in ("fp32", "bf16") for what in ("matrix product", "convolution")
    ]
    assert all(peak.operations_per_second > 1e6 and peak.runs >= 3 for peak in peaks)


def test_the_machine_says_what_it_is_and_the_gpu_is_none_on_a_cpu() -> None:
    about = machine(torch.device("cpu"))
    assert about["processors"] >= 1 and about["memory_bytes"] > 2**28 and about["processor"] and about["gpu"] is None


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc here")
def test_peak_memory_is_the_process_s_own_and_counts_what_it_allocates() -> None:
    child = (
        "from engines.progress import peak_memory_bytes as peak\n"
        "before = peak(); held = b'\\1' * (200 << 20); print(before >> 20, peak() - before >> 20)"
    )
    parent = f"import subprocess, sys\nheld = b'\\1' * (900 << 20)\nsubprocess.run([sys.executable, '-c', {child!r}], check=True)"
    done = subprocess.run([sys.executable, "-c", parent], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    before, grown = map(int, done.stdout.split())
    assert before < 900, "not what its parent held when it started"
    assert 195 <= grown <= 215
