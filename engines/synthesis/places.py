"""Where synthesized images that are to be verified lie: a run's folders, a part of one, or copies anywhere else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from engines import store
from engines.data.decode import read_regular_file
from engines.errors import DataError, UsageError
from engines.synthesis.plan import PLAN_FILE
from engines.synthesis.sheet import MAX_PNG_BYTES, decode_png


class Place(NamedTuple):
    """What is to be verified: a synthesis folder, or a part of it; or images that lie elsewhere, of the plan of such a folder."""

    folder: Path  # holds plan.json
    images: Path  # the folder itself, a class's in it, or another
    run: Path | None  # the run that made them; None where it is not known

    @property
    def root(self) -> Path:
        """What the names of its images begin from."""
        return self.images if self.elsewhere else self.folder

    @property
    def elsewhere(self) -> bool:
        """The images do not lie in the folder of their plan."""
        return not self.images.is_relative_to(self.folder)


def places(folder: Path, run: Path | None = None) -> list[Place]:
    """The synthesis folders that a folder stands for. Raises as `verify.verify`."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}", "name a run folder, or a folder of images that diffrc synth made")
    if (folder / "recipe.toml").is_file() and not (folder / PLAN_FILE).is_file():
        made = [path for path in _synth_folders(folder) if path.parent == folder]
        if not made:
            raise UsageError(f"{folder} has no synthesized images yet", f"diffrc synth --fill --run {folder}")
        return [Place(path, path, run or folder) for path in made]
    here = folder.absolute()
    for place in (here, *here.parents[:2]):  # a class's folder, or its folder of dropped images
        if (place / PLAN_FILE).is_file():
            root = Path(os.path.normpath(folder / os.path.relpath(place, here)))
            return [Place(root, root / here.relative_to(place), run or _run_around(place))]
    return [_elsewhere(folder, run)]


def _synth_folders(run: Path) -> list[Path]:
    """A run's folders of images: its own, those of its other model, and those that are kept aside."""
    return [path.parent for pattern in ("synth*", "stale/synth*") for path in sorted(run.glob(f"{pattern}/{PLAN_FILE}"))]


def _run_around(place: Path) -> Path | None:
    return next((path for path in place.parents[:2] if (path / "recipe.toml").is_file()), None)


def _elsewhere(folder: Path, run: Path | None) -> Place:
    """Images that were copied somewhere, by the plan that the first of them names."""
    named = next((plan for path in pngs(folder) if (plan := _plan_named_in(path))), "")
    if not named:
        raise UsageError(f"{folder} holds no images that diffrc synth made", "name a run folder, or a folder of such images")
    opened = store.open_run(run)
    for place in _synth_folders(opened.path):
        if store.read_json(place / PLAN_FILE).get("plan") == named:
            return Place(place, folder, opened.path)
    raise DataError(
        f"the images in {folder} are of plan {named[:8]}, which {opened.path} does not hold", "--run DIR names the run that made them"
    )


def _plan_named_in(path: Path) -> str:
    try:
        return decode_png(read_regular_file(path, MAX_PNG_BYTES), "", str(path))[1].plan
    except DataError:
        return ""


def pngs(folder: Path) -> Iterator[Path]:
    """Every PNG below a folder, in order; links are not followed."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(root) / name for name in sorted(names) if name.lower().endswith(".png"))
