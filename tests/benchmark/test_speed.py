"""engines/benchmark/{worker,speed,report}.py: fair turns, paired ratios, percentiles, and processes that are measured alone."""

from __future__ import annotations

import contextlib
import json
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import recipe as recipes
from engines import store
from engines.backends import choice
from engines.backends.choice import BUILDS, Build
from engines.benchmark import report, speed, subject
from engines.benchmark.chart import panels_of, speed_png
from engines.benchmark.peaks import Peak
from engines.benchmark.speed import QUICK, Row, Settings, Speed, expected_seconds, take_turns
from engines.benchmark.worker import Arm, Process, Worker, percentile, timed
from engines.errors import EngineError, UsageError

TINY = """name = "tiny"
[data]
image_size_px = 16
[unet]
model_channels = 32
channel_mult = [1, 2]
num_res_blocks = 1
attention_resolutions = []
num_head_channels = 32
[guide]
model_channels = 32
channel_mult = [1, 2]
attention_resolutions = []
num_head_channels = 32
"""
ONNX = Build("onnx", "fp32")


@pytest.fixture(scope="module")
def tiny() -> subject.Subject:
    """A network with random weights."""
    return subject.of_recipe(recipes.load(TINY))


@pytest.fixture(scope="module")
def trained(exported_run: Path) -> subject.Subject:
    """The tiny run's network, exported for ONNX Runtime."""
    return subject.of_run(store.open_run(exported_run))


@pytest.fixture(scope="module")
def folder(trained: subject.Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What measuring processes read of it. To be read only."""
    path = tmp_path_factory.mktemp("bench")
    left_out = speed._prepare(path, trained, Settings(batches=(1, 3)), [ONNX])
    assert set(left_out) <= {"diffusers fp32"}
    return path


@pytest.fixture
def _one_processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A worker in this process, with one thread, and the threads of before."""
    before = torch.get_num_threads()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------------- figures


def test_percentiles_lie_between_the_samples_in_proportion() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([0.0, 10.0], 0.95) == pytest.approx(9.5)
    assert percentile([4.0], 0.95) == 4.0
    assert percentile(list(range(101)), 0.95) == pytest.approx(95)


def test_a_ratio_is_taken_within_a_turn_so_a_machine_that_slows_down_does_not_change_it() -> None:
    slowing = [[1.0, 1.2, 1.1], [2.0, 2.4, 2.2], [8.0, 9.6, 8.8]]
    twice_as_fast = [[sample / 2 for sample in turn] for turn in slowing]
    assert report.ratio_of(slowing, twice_as_fast) == pytest.approx((2.0, 2.0, 2.0, 3))
    low, high = report.ratio_of(slowing, [[1.0], [1.0], [1.0]])[1:3]
    assert (low, high) == (1.1, 8.8)


class Timekeeper:
    """A player that sleeps, and remembers when it was asked."""

    def __init__(self, name: str, seconds: float, asked: list[str]) -> None:
        self.name, self.seconds, self.asked = name, seconds, asked

    def time(self, batch: int, seconds: float) -> list[float]:
        self.asked.append(self.name)
        return [1000 * spent / batch for spent in timed([lambda: time.sleep(self.seconds)], seconds)]


def test_players_take_turns_forward_and_backward_and_the_first_turn_is_not_kept() -> None:
    asked: list[str] = []
    taken = take_turns([Timekeeper("a", 0.001, asked), Timekeeper("b", 0.001, asked)], 1, 3, 0.0)
    assert "".join(asked) == "baabbaab"
    assert [len(turns) for turns in taken] == [3, 3]


def test_a_sleeper_of_known_speed_is_measured_as_fast_as_it_is() -> None:
    asked: list[str] = []
    slow, fast = take_turns([Timekeeper("slow", 0.04, asked), Timekeeper("fast", 0.01, asked)], 4, 3, 0.05)
    assert statistics.median(sample for turn in slow for sample in turn) == pytest.approx(10, rel=0.35)  # ms an image at batch 4
    assert report.ratio_of(slow, fast).median == pytest.approx(4, rel=0.35)


def test_works_side_by_side_begin_together_on_threads_of_their_own() -> None:
    seen: set[int] = set()

    def work() -> None:
        seen.add(threading.get_ident())
        time.sleep(0.02)

    with ThreadPoolExecutor(3) as pool:
        spent = timed([work] * 3, 0.0, pool)
    assert len(seen) == len(spent) == 3


# ---------------------------------------------------------------------------------------------------------------- arms


@pytest.mark.usefixtures("_one_processor")
@pytest.mark.parametrize(
    ("runtime", "precision", "most"), [("torch", "fp32", 1e-6), ("onnx", "fp32", 1e-5), ("autocast", "bf16", 0.05), ("torch", "bf16", 0.05)]
)
def test_every_way_gives_torchs_numbers_to_its_precision(folder: Path, runtime: str, precision: Any, most: float) -> None:
    error = Worker(Arm(runtime, precision), folder).one_step_error()
    assert error <= most
    assert (error > 1e-4) == (precision == "bf16"), "what computes in bf16 shows it"


@pytest.mark.usefixtures("_one_processor")
def test_diffusers_class_with_the_same_weights_gives_the_same_numbers(tiny: subject.Subject, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="diffusers, of the extra `test`, is not here")
    assert speed._prepare(tmp_path, tiny, Settings(batches=(1, 3)), []) == {}
    assert Worker(Arm("diffusers", "fp32"), tmp_path).one_step_error() < 1e-5


@pytest.mark.usefixtures("_one_processor")
def test_side_by_side_every_processor_has_a_batch_and_the_time_is_the_machines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    worker = Worker(Arm("torch", "fp32", "throughput"), folder)
    monkeypatch.setattr(worker, "_evaluation", lambda _: lambda: time.sleep(0.03))
    samples = worker.time(2, 0.0)
    assert len(samples) == 3 and statistics.median(samples) == pytest.approx(1000 * 0.03 / (2 * 3), rel=0.3)


@pytest.mark.usefixtures("_one_processor")
@pytest.mark.parametrize(
    ("runtime", "precision", "guided"),
    [("torch", "fp32", "plain"), ("autocast", "bf16", "plain"), ("onnx", "fp32", "loop")],
)
def test_a_guided_arm_runs_the_whole_step(folder: Path, runtime: str, precision: Any, guided: Any) -> None:
    worker = Worker(Arm(runtime, precision, guided=guided, sampling_steps=2), folder)
    assert worker.load(2) > 0
    assert all(sample > 0 for sample in worker.time(2, 0.0))


def test_random_weights_are_always_the_same_and_none_is_zero(tiny: subject.Subject) -> None:
    again = subject.of_recipe(recipes.load(TINY))
    ours, theirs = tiny.unet.state_dict(), again.unet.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert all(bool(value.any()) for value in ours.values() if value.ndim > 1)
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 500])
    assert 0.05 < float(tiny.unet(x, t).square().mean().sqrt()) < 5


def test_what_a_run_published_is_measured_where_it_lies(folder: Path, exported_run: Path) -> None:
    assert store.read_json(folder / "engines.json") == {"onnx fp32": str(exported_run / "engines" / "onnx" / "target.onnx")}
    assert not (folder / "network.onnx").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("_one_processor")
@pytest.mark.parametrize("build", BUILDS, ids=str)
def test_what_is_not_published_is_made_here_and_steps_in_one_graph_with_it(tiny: subject.Subject, tmp_path: Path, build: Build) -> None:
    try:
        choice.require(build)
    except EngineError as error:
        pytest.skip(error.problem)
    assert speed._prepare(tmp_path, tiny, Settings(batches=(1, 3), runtimes=(build.kind,)), [build]) == {}
    assert Worker(Arm(build.kind, build.precision), tmp_path).one_step_error() <= (1e-5 if build.precision == "fp32" else 0.05)
    refused = subject.provide_steps(tmp_path, tiny, [build], 3)
    if build.precision == "fp16":
        assert "no guided step in one graph" in refused[build]
        return
    worker = Worker(Arm(build.kind, build.precision, guided="fused", sampling_steps=2), tmp_path)
    assert refused == {} and worker.load(3) > 0 and worker.time(3, 0.0)[0] > 0


# ------------------------------------------------------------------------------------------------------------ processes


@pytest.mark.slow
def test_a_measurement_of_two_engines_is_one_document(trained: subject.Subject) -> None:
    settings = Settings(batches=(1, 2), modes=("latency",), turns=2, visit_seconds=0.01, peak_seconds=0.0, runtimes=("onnx",))
    jobs: list[str] = []
    found = report.document(speed.measure(trained, settings, lambda what, *_: jobs.append(what), [ONNX]))
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(json.dumps(found))
    assert [(row["engine"], row["batch"]) for row in found["rows"]] == [(e, b) for b in (1, 2) for e in ("torch fp32", "onnx fp32")]
    assert dict.fromkeys(jobs) == dict.fromkeys(("prepare", "latency, batch 1", "latency, batch 2"))
    for row in found["rows"]:
        assert row["ms_per_image"]["p50"] <= row["ms_per_image"]["p95"]
        assert row["peak_memory_bytes"] > row["start_memory_bytes"] > 2**26
        assert row["first_run_seconds"] > 0 and row["one_step_error"] < 1e-5 and row["over_torch"]["turns"] == 2
        assert len(row["samples_ms"]) == 2 and row["n"] == sum(map(len, row["samples_ms"]))
    assert found["guided"] == [] and found["left_out"] == {}
    assert {"processor", "flags", "processors"} <= set(found["machine"]) and "torch" in found["versions"]
    assert speed_png(found).startswith(b"\x89PNG")
    assert all(len(line) == len(report.EVALUATION_COLUMNS) for line in report.evaluation_table(found, "latency"))


def test_an_engine_that_takes_its_process_with_it_is_told_of(folder: Path, tmp_path: Path) -> None:
    process = Process(Arm("torch", "fp32"), tmp_path)
    process._process.kill()
    with pytest.raises(EngineError, match="the process of torch fp32 ended with code -9"):
        process.load(1)
    process.close()


def test_what_a_process_refuses_comes_back_as_it_was_said(folder: Path) -> None:
    process = Process(Arm("openvino", "fp16", threads=1), folder)
    try:
        with pytest.raises(AssertionError, match="KeyError"):  # never made: no such engine in the folder
            process.load(1)
        assert process.memory()[1] > 0, "and it still answers"
    finally:
        process.close()


# ------------------------------------------------------------------------------------------------------------ documents


def made(turns: dict[str, list[list[float]]], guided: dict[str, list[list[float]]] | None = None) -> dict[str, Any]:
    """The document of a measurement with these samples at batch 8."""
    rows = [Row(Arm(*name.split(), "latency"), 8, tuple(map(tuple, t)), 1.0, 2**28, 2**29, 1e-6) for name, t in turns.items()]  # type: ignore[arg-type]
    for name, t in (guided or {}).items():
        runtime, precision, way = name.split()
        rows.append(Row(Arm(runtime, precision, "latency", way), 8, tuple(map(tuple, t)), 1.0, 2**28, 2**29, None))  # type: ignore[arg-type]
    network = {"name": "n", "weights": "random", "parameters": 10**6, "operations_per_image": 2 * 10**9, "evaluations": 250, "steps": 250}
    machine = {"processor": "P", "model": "", "processors": 2, "flags": ["amx_bf16"], "gpu": None}
    peaks = (Peak("matrix product", "fp32", "4096^3", 400e9, 3), Peak("convolution", "fp32", "", 500e9, 3))
    facts = network | {"sampler": "ddpm"}
    return report.document(
        Speed(QUICK, facts, machine, {"torch": "2"}, peaks, tuple(rows), {"a": "why", "b": "why"}, "2026-01-01T00:00:00")
    )


def test_speed_share_of_peak_and_images_a_second_follow_from_the_median() -> None:
    found = made({"torch fp32": [[10.0], [20.0], [30.0]], "onnx fp32": [[5.0], [10.0], [10.0]]})
    torch_row, onnx = found["rows"]
    assert torch_row["images_per_second"] == pytest.approx(1000 / 20 / 250)
    assert torch_row["share_of_peak"] == pytest.approx(2e9 / 0.020 / 400e9)  # of the matrix product, not the convolution
    assert onnx["over_torch"] == {"median": 2.0, "low": 2.0, "high": 3.0, "turns": 3}
    assert onnx["over_diffusers"] is None


def test_guided_steps_are_scaled_to_the_recipes_and_compared_with_both_plain_loops() -> None:
    guided = {"torch fp32 plain": [[20.0], [40.0]], "autocast bf16 plain": [[10.0], [20.0]], "onnx fp32 loop": [[4.0], [8.0]]}
    found = made({"torch fp32": [[1.0], [2.0]]}, guided)
    plain, half, ours = found["guided"]
    assert plain["seconds_per_image"] == pytest.approx(30 * 250 / 1000)
    assert ours["over_plain_fp32"]["median"] == 5.0 and ours["over_plain_bf16"]["median"] == 2.5
    assert (half["engine"], ours["engine"]) == ("autocast bf16, plain", "onnx fp32 + torch guide")
    assert speed_png(found).startswith(b"\x89PNG")


class Failing:
    """A process whose arm cannot run batches above `most`."""

    def __init__(self, arm: Arm, most: int) -> None:
        self.arm, self.most = arm, most

    def load(self, batch: int) -> float:
        return 1.0

    def time(self, batch: int, seconds: float) -> list[float]:
        if batch > self.most:
            raise EngineError("out of memory", "a smaller batch")
        return [1.0]

    def memory(self) -> tuple[int, int]:
        return 1, 2

    def one_step_error(self) -> float:
        return 0.0


def test_an_engine_that_fails_at_a_larger_batch_is_left_out_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arms = [Arm("torch", "fp32"), Arm("onnx", "fp32")]

    @contextlib.contextmanager
    def working(_arms: Sequence[Arm], _folder: Path) -> Iterator[list[Failing]]:
        yield [Failing(arms[0], 8), Failing(arms[1], 1)]

    monkeypatch.setattr(speed, "working", working)
    left_out: dict[str, str] = {}
    rows = speed._play(tmp_path, arms, Settings(batches=(1, 8), turns=2), left_out, "latency", speed.silent, [])
    assert [(row.arm.name, row.batch) for row in rows] == [("torch fp32", 1), ("torch fp32", 8)]
    assert [len(row.turns_ms) for row in rows] == [2, 2]
    assert left_out == {"onnx fp32 (latency, batch 8)": "out of memory"}


def test_what_is_left_out_for_one_reason_is_told_once() -> None:
    assert report.sentences(made({"torch fp32": [[1.0], [1.0]]}))[-1] == "left out: a, b: why"


def test_tables_fit_eighty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    from diffrc_cli.bench import _show

    found = made({"torch fp32": [[99.9], [100.4]], "autocast bf16": [[1.23], [1.4]]}, {"openvino fp32 fused": [[1.0], [2.0]]})
    _show(found)
    tables = capsys.readouterr().out.split("n (random")[0]
    assert max(map(len, tables.splitlines())) <= 80


def test_the_estimate_grows_with_what_is_asked_for_and_a_quick_one_is_about_a_minute() -> None:
    base = expected_seconds(0.01, BUILDS, Settings(), exported=True)
    assert expected_seconds(0.01, BUILDS, Settings(guided=True), exported=True) > base
    assert expected_seconds(0.01, BUILDS, Settings(turns=14), exported=True) > base
    assert expected_seconds(0.01, BUILDS, Settings(), exported=False) > base
    assert expected_seconds(0.1, BUILDS, Settings(), exported=True) > base
    assert expected_seconds(0.01, BUILDS, Settings(runtimes=("onnx",)), exported=True) < base
    assert 30 < expected_seconds(0.012, BUILDS[:4], QUICK, exported=False) < 90  # the small network on two cores


def test_a_chart_shows_at_most_three_batch_sizes() -> None:
    assert panels_of([1, 8, 8, 32]) == [1, 8, 32]
    assert panels_of([1, 2, 4, 8, 16]) == [1, 4, 16]


def test_guided_steps_need_a_guide_and_a_sampler_without_memory(tiny: subject.Subject) -> None:
    settings = Settings(guided=True)
    with pytest.raises(UsageError, match="the guide is not trained"):
        speed.require(replace(tiny, guide=None), settings)
    two_steps = recipes.load(TINY, ("synth.sampler=dpmpp_2m",))
    with pytest.raises(UsageError, match="ddpm and ddim"):
        speed.require(replace(tiny, recipe=two_steps), settings)
