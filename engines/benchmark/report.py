"""A measurement in one document of plain JSON values, and the rows of its tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from engines.backends.base import Precision
from engines.benchmark.speed import DIFFUSERS, Row, Speed
from engines.benchmark.worker import percentile

DIGITS = 5  # of a sample, significant

EVALUATION_COLUMNS = ("engine", "batch", "ms p50", "p95", "img/s", "x torch", "from to", "of peak")
COST_COLUMNS = ("engine", "first run s", "peak MiB", "torch alone", "one-step error")
GUIDED_COLUMNS = ("guided step", "batch", "s/image", "x fp32", "from to", "x bf16", "from to")


class Ratio(NamedTuple):
    """How many times as fast one is as another: turn by turn, since both meet the same moments of the machine."""

    median: float
    low: float
    high: float
    turns: int

    @property
    def spread(self) -> str:
        """As a table has it."""
        return f"{self.low:.2f}-{self.high:.2f}"


def ratio_of(reference: Sequence[Sequence[float]], turns: Sequence[Sequence[float]]) -> Ratio:
    """The reference's median of a turn over the other's of the same turn: above 1 where the other is faster."""
    found = [statistics.median(a) / statistics.median(b) for a, b in zip(reference, turns, strict=True)]
    return Ratio(statistics.median(found), min(found), max(found), len(found))


def document(speed: Speed) -> dict[str, Any]:
    """Everything that was measured, with every sample.

    `rows` holds an entry for each engine, mode and batch size, `guided` one for each way to make a whole guided step. Times are of one
    image and one evaluation (or step) of the whole machine. `share_of_peak` is of the matrix product's in the engine's precision.
    """
    peaks = {peak.precision: peak.operations_per_second for peak in speed.peaks if peak.what == "matrix product"}
    return {
        "format": 1,
        "what": "speed",
        "began": speed.began,
        "seconds": round(speed.seconds, 1),
        "network": speed.network,
        "machine": speed.machine,
        "versions": speed.versions,
        "settings": asdict(speed.settings),
        "peaks": [peak._asdict() for peak in speed.peaks],
        "rows": [_evaluation(row, speed, peaks) for row in speed.rows if not row.arm.guided],
        "guided": [_guided(row, speed) for row in speed.rows if row.arm.guided],
        "left_out": speed.left_out,
    }


def _common(row: Row) -> dict[str, Any]:
    return {
        "engine": row.arm.name,
        "runtime": row.arm.runtime,
        "precision": row.arm.precision,
        "mode": row.arm.mode,
        "batch": row.batch,
        "n": sum(map(len, row.turns_ms)),
        "turns": len(row.turns_ms),
        "first_run_seconds": row.first_run_seconds,
        "peak_memory_bytes": row.peak_bytes,
        "start_memory_bytes": row.start_bytes,
        "samples_ms": [[float(f"{sample:.{DIGITS}g}") for sample in turn] for turn in row.turns_ms],
    }


def _evaluation(row: Row, speed: Speed, peaks: Mapping[Precision, float]) -> dict[str, Any]:
    samples = [sample for turn in row.turns_ms for sample in turn]
    p50 = percentile(samples, 0.5)
    peak, operations = peaks.get(row.arm.precision), speed.network["operations_per_image"]
    return _common(row) | {
        "ms_per_image": {"p50": p50, "p95": percentile(samples, 0.95)},
        "images_per_second": 1000 / (p50 * speed.network["evaluations"]),
        "share_of_peak": 1000 * operations / p50 / peak if peak else None,
        "one_step_error": row.one_step_error,
        "over_torch": _over(speed, row, "torch fp32"),
        "over_diffusers": _over(speed, row, DIFFUSERS),
    }


def _guided(row: Row, speed: Speed) -> dict[str, Any]:
    samples = [sample for turn in row.turns_ms for sample in turn]
    p50, steps = percentile(samples, 0.5), speed.network["steps"]
    return _common(row) | {
        "ms_per_step": {"p50": p50, "p95": percentile(samples, 0.95)},
        "seconds_per_image": p50 * steps / 1000,  # scaled from settings.sampling_steps measured ones
        "over_plain_fp32": _over(speed, row, "torch fp32, plain"),
        "over_plain_bf16": _over(speed, row, "autocast bf16, plain"),
    }


def _over(speed: Speed, row: Row, reference: str) -> dict[str, Any] | None:
    """The ratio to an arm that took its turns beside this one: of the same mode, or one of the guided."""
    for other in speed.rows:
        beside = bool(other.arm.guided) if row.arm.guided else other.arm.mode == row.arm.mode and not other.arm.guided
        if other.arm.name == reference and other.batch == row.batch and beside:
            return ratio_of(other.turns_ms, row.turns_ms)._asdict()
    return None


# --------------------------------------------------------------------------------------------------------------- tables


def modes_of(document: Mapping[str, Any]) -> list[str]:
    """The modes that were measured, in order."""
    return list(dict.fromkeys(row["mode"] for row in document["rows"]))


def evaluation_table(document: Mapping[str, Any], mode: str) -> list[tuple[Any, ...]]:
    """Rows for EVALUATION_COLUMNS, by batch size."""
    rows = sorted((row for row in document["rows"] if row["mode"] == mode), key=lambda row: int(row["batch"]))
    return [
        (
            row["engine"],
            row["batch"],
            f"{row['ms_per_image']['p50']:.3g}",
            f"{row['ms_per_image']['p95']:.3g}",
            f"{row['images_per_second']:.3g}",
            *_cells(row["over_torch"]),
            f"{row['share_of_peak']:.0%}" if row["share_of_peak"] else None,
        )
        for row in rows
    ]


def cost_table(document: Mapping[str, Any], mode: str) -> list[tuple[Any, ...]]:
    """Rows for COST_COLUMNS: one for each engine, at the largest batch size."""
    largest = {row["engine"]: row for row in document["rows"] if row["mode"] == mode}
    return [
        (
            name,
            f"{row['first_run_seconds']:.3g}",
            f"{row['peak_memory_bytes'] / 2**20:.0f}",
            f"{row['start_memory_bytes'] / 2**20:.0f}",
            f"{row['one_step_error']:.1e}",
        )
        for name, row in largest.items()
    ]


def guided_table(document: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Rows for GUIDED_COLUMNS, by batch size."""
    rows = sorted(document["guided"], key=lambda row: int(row["batch"]))
    return [
        (row["engine"], row["batch"], f"{row['seconds_per_image']:.3g}", *_cells(row["over_plain_fp32"]), *_cells(row["over_plain_bf16"]))
        for row in rows
    ]


def sentences(document: Mapping[str, Any]) -> list[str]:
    """What the tables do not say: the machine, its peaks, how it was measured, who is missing and why."""
    machine, network, settings = document["machine"], document["network"], document["settings"]
    flags = f" with {', '.join(machine['flags'])}" if machine["flags"] else ""
    gpu = f"; {machine['gpu']['name']}" if machine["gpu"] else ""
    used = settings["threads"] or machine["processors"]
    best = ", ".join(f"{peak['what']} {peak['precision']} {peak['operations_per_second'] / 1e9:,.0f}" for peak in document["peaks"])
    said = [
        f"{network['name']} ({network['weights']} weights): {network['parameters'] / 1e6:.2f} M parameters, "
        f"{network['operations_per_image'] / 1e9:.3g} GFLOP an image and evaluation, {network['evaluations']} evaluations an image.",
        f"{machine['processor']}, {machine['model']}{flags}{gpu}; {used} of {machine['processors']} processors used.",
        f"Peaks measured here, GFLOP/s: {best}.",
        f"n = {settings['turns']} turns of {settings['visit_seconds']:g} s, engines in turn; a ratio is the median of those within a turn, "
        "from its lowest to its highest.",
    ]
    if len({row["precision"] for row in document["rows"]}) > 1:
        said.append("bf16 beside fp32 is less precision for more speed: the one-step error says how much less.")
    if document["guided"]:
        said.append(
            f"Guided: whole {network['sampler']} steps, {settings['sampling_steps']} of them measured at a time and scaled to "
            f"{network['steps']}; plain is a script's loop, one batch at a time on all threads."
        )
    reasons = dict.fromkeys(document["left_out"].values())
    said += [f"left out: {', '.join(n for n, why in document['left_out'].items() if why == reason)}: {reason}" for reason in reasons]
    return said


MODE_TITLES = {
    "latency": "one evaluation at a time on all threads",
    "throughput": "side by side, one thread each, as images are synthesized",
}


def _cells(ratio: Mapping[str, Any] | None) -> tuple[str | None, str | None]:
    return (f"{ratio['median']:.2f}", Ratio(**ratio).spread) if ratio else (None, None)
