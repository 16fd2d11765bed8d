"""`diffrc data export`: the balanced data set of a run, for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from diffrc_cli import console
from diffrc_cli.options import DataOption, JsonOption, RunOption

if TYPE_CHECKING:
    from engines.sharing.share import Shared

MIB = 1 << 20

OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="A new or empty folder, or an earlier export.", show_default=False)]
FormatOption = Annotated[
    Literal["folder", "imagefolder", "parquet", "webdataset"],
    typer.Option(
        "--format",
        help="folder: torchvision, ultralytics, Keras. imagefolder, parquet: Hugging Face datasets. webdataset: tar shards.",
    ),
]
TestOption = Annotated[bool, typer.Option("--test/--no-test", help="The real test images too, as a split of their own.")]
CleanlabOption = Annotated[
    bool, typer.Option("--cleanlab", help="Also out-of-sample probabilities and features for cleanlab; trains recognizers.")
]
FoldsOption = Annotated[
    int,
    typer.Option("--folds", metavar="N", min=2, help="Recognizers that --cleanlab trains, each on all real images but a fold."),
]
ShardOption = Annotated[int, typer.Option("--shard-mib", metavar="N", min=1, help="A table or tar at most, in MiB.")]
ReplaceOption = Annotated[bool, typer.Option("--force", help="Replace an earlier export that differs; nothing else is ever replaced.")]


def export(
    out: OutOption,
    layout: FormatOption = "folder",
    run: RunOption = None,
    data: DataOption = None,
    test: TestOption = True,
    cleanlab: CleanlabOption = False,
    folds: FoldsOption = 5,
    shard_mib: ShardOption = 256,
    force: ReplaceOption = False,
    json: JsonOption = False,
) -> None:
    """Write a run's balanced data set for other tools: its real long tail and its kept synthetic images, marked, with a data card.

    Example: diffrc data export --format parquet --out balanced
    """
    from json import dumps

    from engines import store
    from engines.data.longtail import prepare
    from engines.sharing.share import share

    found = store.open_run(run, (f"data.path={dumps(str(data.absolute()))}",) if data else ())
    found.classes()  # trained at all? says so before any image is read
    if run is None:
        console.note(f"run: {found.path}")
    with console.progress() as report:
        shared = share(
            found,
            prepare(found.recipe.data, None),
            out,
            layout,
            test=test,
            cleanlab_folds=folds if cleanlab else 0,
            shard_bytes=shard_mib * MIB,
            force=force,
            report=report,
            tell=console.note,
        )
    if json:
        console.emit_json(shared.to_json())
    else:
        _show(shared)


def _show(shared: Shared) -> None:
    from engines.sharing.card import reading

    if not shared.written:
        console.say(f"{shared.folder} is this very export already: nothing to do")
    columns = zip(shared.names, shared.real, shared.groups, shared.synthetic, strict=True)
    console.bars("training images, real + synthetic", [console.Bar(*column) for column in columns])
    test = f", {sum(shared.test):,} test" if sum(shared.test) else ""
    size = f"{shared.bytes / MIB:,.1f} MiB in {shared.files:,} files"
    console.say(f"{sum(shared.real):,} real + {sum(shared.synthetic):,} synthetic training images{test}: {size}")
    console.say(f"lies in: {shared.folder} ({shared.layout})")
    console.say(f"card: {shared.card}; its license is yours to fill in")
    console.say("to read it, in Python:")
    for line in reading(shared.layout, str(shared.folder)).splitlines():
        if line:
            console.say(f"  {line}")
