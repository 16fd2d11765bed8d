"""`diffrc bench`: how fast the engines are here; `diffrc bench quality`: what few steps cost."""

from __future__ import annotations

import typer

from diffrc_cli import bench_quality, console
from diffrc_cli.options import DeviceOption, JsonOption

app = typer.Typer(invoke_without_command=True, help="How fast the engines are here, and what few steps cost in quality.")
app.command()(bench_quality.quality)


@app.callback()
def bench(context: typer.Context, device: DeviceOption = "auto", json: JsonOption = False) -> None:
    """Measure what this machine can do at most, in matrix products and in convolutions.

    Example: diffrc bench
    """
    if context.invoked_subcommand:
        return
    from engines.benchmark.peaks import machine, measure_peaks
    from engines.training.stages import choose_device

    chosen = choose_device(device)
    peaks = measure_peaks(chosen)
    if json:
        console.emit_json({"machine": machine(chosen), "peaks": [peak._asdict() for peak in peaks]})
        return
    rows = [(peak.what, peak.precision, peak.operations_per_second / 1e9, peak.shape) for peak in peaks]
    console.table("", ("peak", "precision", "GFLOP/s", "of"), rows)
