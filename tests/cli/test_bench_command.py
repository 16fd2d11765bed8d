"""diffrc bench: what it measures is named in one way, mistakes are told before the work, and results come in three forms."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffrc_cli.bench import batches_of
from engines.errors import UsageError

Diffrc = Callable[..., subprocess.CompletedProcess[str]]
Call = Callable[..., Any]  # (code, out, err)


def test_batch_sizes_come_in_rising_order_and_once() -> None:
    assert batches_of("32, 1,8,8") == (1, 8, 32)


@pytest.mark.parametrize("text", ["", "0", "8,", "-1", "1.5", "4097", "8;16"])
def test_what_is_no_list_of_batch_sizes_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no list of batch sizes"):
        batches_of(text)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--network small --recipe digits-lt", "--recipe and --network name two networks"),
        ("--network small --chart speed.svg", "--chart speed.svg is no name of a PNG file"),
        ("--network small --threads 4096", "--threads 4096: this process may use"),
        ("--network small --batch none", "--batch none is no list of batch sizes"),
        ("", "there is no run in ./runs"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(words: str, problem: str, call_in_empty: Call, tmp_path: Path) -> None:
    done = call_in_empty("bench", *words.split())
    assert done.code == 2
    assert f"error: {problem}" in done.err and "try:" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_is_measured_as_a_table_and_drawn_and_nothing_else_is_written(exported_run: Path, diffrc: Diffrc, tmp_path: Path) -> None:
    before = sorted(exported_run.rglob("*"))
    words = f"bench --run {exported_run} --quick --turns 1 --batch 2 --engine onnx --threads 1 --chart speed.png"
    done = diffrc(*words.split())
    assert done.returncode == 0, done.stderr
    assert "takes about" in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "throughput: side by side, one thread each, as images are synthesized; ms an image"
    assert [line.split()[0] for line in lines[2:4]] == ["torch", "onnx"]
    assert lines[-1] == "chart: speed.png"
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["speed.png"] and sorted(exported_run.rglob("*")) == before


@pytest.mark.slow
def test_a_network_is_measured_with_guided_steps_as_one_document(diffrc: Diffrc) -> None:
    words = "bench --recipe digits-lt --set unet.model_channels=32 --quick --turns 1 --batch 2 --guided --json"
    done = diffrc(*words.split())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"rows", "guided", "peaks", "machine", "versions", "network", "settings", "left_out"} <= set(found)
    ways = {row["engine"] for row in found["guided"]}
    assert {"torch fp32, plain", "autocast bf16, plain", "onnx fp32 + torch guide", "onnx fp32, fused"} <= ways
    assert all(row["over_plain_fp32"]["turns"] == 1 for row in found["guided"])
