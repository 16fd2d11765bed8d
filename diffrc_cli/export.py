"""`diffrc export`: a trained network as an engine file that agreed with torch."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from diffrc_cli import console
from diffrc_cli.options import JsonOption, RunOption, SetOption

ModelOption = Annotated[
    Literal["target", "source"] | None,
    typer.Option("--model", help="The network to export. Default: synth.model of the run's recipe.", show_default=False),
]
EngineOption = Annotated[Literal["onnx"], typer.Option("--engine", help="The kind of engine.")]


def export(
    run: RunOption = None,
    model: ModelOption = None,
    engine: EngineOption = "onnx",
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Export the trained U-Net to ONNX and hold it to torch's numbers; a file that disagrees is not written (exit 6).

    Example: diffrc export
    """
    from engines.backends.export import export_run, onnx_path
    from engines.store import open_run

    folder = open_run(run, tuple(overrides or ()))
    model = model or folder.recipe.synth.model
    with console.progress() as report:
        (card,) = export_run(folder, (model,), report)
    path = onnx_path(folder, model)
    if json:
        console.emit_json({"model": model, "file": path, **card.model_dump(exclude={"self_test"})})
        return
    console.say(f"{model}: {path}, {path.stat().st_size / 2**20:.1f} MiB, opset {card.opset}, {card.precision}")
    console.say(
        f"against torch: one evaluation within {card.one_step_error:.1e} (allowed {card.tolerance:.0e}), "
        f"a short trajectory within {card.trajectory_psnr_db:.0f} dB"
    )
    console.say("next: diffrc synth --fill, or diffrc synth --class NAME --n 50")
