"""`diffrc verify`: are these images what they say? Every file checked, a random sample made again and compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from diffrc_cli import console
from diffrc_cli.options import DataOption, JsonOption
from engines.errors import ParityError, UsageError

if TYPE_CHECKING:
    from engines.synthesis.examine import Disagreement
    from engines.synthesis.verify import Verification

SHOWN = 20  # disagreements in the terminal; --json has all of them
NAMED = 3  # in the last line

FolderArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[DIR]",
        help="A run folder, its synth folder, a class's in it, or any folder of its images. Default: the latest run in ./runs.",
        show_default=False,
    ),
]
SampleOption = Annotated[
    int | None,
    typer.Option("--sample", metavar="N", min=0, help="Make so many again; 0 = files only. Default: 1 %, at least 16.", show_default=False),
]
AllOption = Annotated[bool, typer.Option("--all", help="Make every image again.")]
SeedOption = Annotated[
    int | None, typer.Option("--seed", metavar="N", min=0, help="Draws the sample. Default: another one each time.", show_default=False)
]
EngineOption = Annotated[
    Literal["onnx", "openvino", "tensorrt", "torch"] | None,
    typer.Option("--engine", help="Make them with another engine, in float32. Default: the one that made them.", show_default=False),
]
RunOption = Annotated[
    Path | None,
    typer.Option("--run", metavar="DIR", help="The run that made them. Default: the one they lie in, else the latest.", show_default=False),
]


def verify(
    folder: FolderArgument = None,
    sample: SampleOption = None,
    everything: AllOption = False,
    seed: SeedOption = None,
    engine: EngineOption = None,
    run: RunOption = None,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Check every synthesized image (text, hash, place, manifest), make some of them again, and compare.

    Nothing is written. Where something disagrees, it is named and the exit code is 6.

    Example: diffrc verify runs/digits-lt --sample 50
    """
    import secrets
    import sys

    from engines import store
    from engines.synthesis import verify as verification

    if everything and sample is not None:
        raise UsageError("--all and --sample exclude each other", "diffrc verify --all, or --sample N")
    drawn_by = secrets.randbelow(2**31) if seed is None else seed
    where = folder or store.open_run(run).path
    with console.progress() as report:
        results = verification.verify(where, run, sys.maxsize if everything else sample, drawn_by, engine, report, data)
    if json:
        console.emit_json([found.to_json() for found in results])
    else:
        for found in results:
            _show(found)
    wrong = [(result, found) for result in results for found in result.disagreements]
    if wrong:
        raise _disagreement(wrong)
    for failure in (result.failure for result in results if result.failure):
        raise failure


def _show(found: Verification) -> None:
    from engines.data.names import shorten

    verdict = "every file agrees" if not found.disagreements else "not all agree"
    console.prose(f"{found.folder}: {_count(found.images)} of plan {found.plan[:8]} checked; {verdict}")
    for file, what in found.disagreements[:SHOWN]:
        console.prose(f"  {shorten(file)}: {what}")
    if len(found.disagreements) > SHOWN:
        console.prose(f"  and {len(found.disagreements) - SHOWN:,} more; --json lists all of them")
    if found.engine:
        close = f", {found.close:,} within 1 of 255" if found.close else ""
        console.prose(f"{_count(found.asked)} made again with {found.engine} (--seed {found.seed}): {found.equal:,} bit for bit{close}")
        if found.why_close and found.equal != found.asked:
            console.prose(f"not held to every bit: {found.why_close}")
    elif found.asked:
        console.prose("none was made again")


def _count(images: int) -> str:
    return "1 image" if images == 1 else f"{images:,} images"


def _disagreement(wrong: list[tuple[Verification, Disagreement]]) -> ParityError:
    files = list(dict.fromkeys(str(result.folder / found.file) for result, found in wrong))
    more = f" and {len(files) - NAMED:,} more" if len(files) > NAMED else ""
    told = ", ".join(files[:NAMED])
    number = "1 file disagrees" if len(files) == 1 else f"{len(files):,} files disagree"
    plan_too = any(found.file == "plan.json" for _, found in wrong)
    remedy = "restore plan.json" if plan_too else "remove them; the diffrc synth command that made them makes them again"
    return ParityError(f"{number}: {told}{more}", remedy)
